/** Light, dark, or as the system says. */

export type Theme = "system" | "light" | "dark";

const KEY = "nexus.theme";

class ThemeState {
  choice = $state<Theme>(read());

  constructor() {
    this.apply();
  }

  set(choice: Theme): void {
    this.choice = choice;
    try {
      localStorage.setItem(KEY, choice);
    } catch {
      // Private windows may have no storage: the choice lasts as long as the page.
    }
    this.apply();
  }

  private apply(): void {
    if (this.choice === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = this.choice;
  }
}

function read(): Theme {
  try {
    const stored = localStorage.getItem(KEY);
    return stored === "light" || stored === "dark" ? stored : "system";
  } catch {
    return "system";
  }
}

export const theme = new ThemeState();
