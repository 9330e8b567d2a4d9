/** The time for relative times, which moves once a second while the page is visible. */

class Now {
  /** Unix seconds. */
  seconds = $state(Date.now() / 1000);

  constructor() {
    setInterval(() => {
      if (!document.hidden) this.seconds = Date.now() / 1000;
    }, 1000);
    document.addEventListener("visibilitychange", () => (this.seconds = Date.now() / 1000));
  }
}

export const now = new Now();
