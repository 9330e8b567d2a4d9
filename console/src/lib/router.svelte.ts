/** Routes below `/ui/`: the path names the screen, the query holds its filters. */

const BASE = "/ui/";

class Router {
  path = $state(pathOf(location.pathname));
  query = $state(new URLSearchParams(location.search));
  /** Asked before the screen is left; returns whether it may be. */
  guard: (() => boolean) | null = null;

  constructor() {
    addEventListener("popstate", () => this.read());
    document.addEventListener("click", (event) => this.follow(event));
  }

  /** Go to a path below `/ui/`, such as `jobs/job_1?view=raw`. */
  go(to: string, { replace = false }: { replace?: boolean } = {}): void {
    if (this.guard && !this.guard()) return;
    const url = new URL(to.replace(/^\/ui\//, ""), location.origin + BASE);
    if (replace) history.replaceState(null, "", url);
    else history.pushState(null, "", url);
    const before = this.path;
    this.read();
    if (!replace && this.path !== before) scrollTo(0, 0);
  }

  /** Return one value of the query; empty: it is not set. */
  get(name: string): string {
    return this.query.get(name) ?? "";
  }

  /** Change values of the query; empty ones are removed. Filters replace the entry of the history: Back leaves the screen. */
  set(values: Record<string, string | number | null | undefined>, { push = false }: { push?: boolean } = {}): void {
    const query = new URLSearchParams(this.query);
    for (const [name, value] of Object.entries(values)) {
      if (value === null || value === undefined || value === "") query.delete(name);
      else query.set(name, String(value));
    }
    const text = query.toString();
    const url = location.pathname + (text ? `?${text}` : "");
    if (push) history.pushState(null, "", url);
    else history.replaceState(null, "", url);
    this.query = query;
  }

  private read(): void {
    this.path = pathOf(location.pathname);
    this.query = new URLSearchParams(location.search);
  }

  private follow(event: MouseEvent): void {
    if (event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
    const link = (event.target as Element).closest?.("a");
    if (!link || link.target || link.hasAttribute("download") || link.origin !== location.origin) return;
    if (!link.pathname.startsWith(BASE)) return;
    event.preventDefault();
    this.go(link.pathname.slice(BASE.length) + link.search);
  }
}

function pathOf(pathname: string): string {
  return pathname.startsWith(BASE) ? pathname.slice(BASE.length).replace(/\/+$/, "") : "";
}

/** Return the parameters of a path that matches `pattern` (`queues/:model`); null: it does not match. */
export function match(pattern: string, path: string): Record<string, string> | null {
  const wanted = pattern.split("/");
  const found = path.split("/");
  if (wanted.length !== found.length) return null;
  const params: Record<string, string> = {};
  for (const [i, part] of wanted.entries()) {
    const text = found[i]!;
    if (part.startsWith(":")) {
      try {
        params[part.slice(1)] = decodeURIComponent(text);
      } catch {
        return null;
      }
    } else if (part !== text) return null;
  }
  return params;
}

/** Return the link to a screen: `href("queues", model)`. */
export function href(...parts: string[]): string {
  return BASE + parts.map(encodeURIComponent).join("/");
}

export const router = new Router();
