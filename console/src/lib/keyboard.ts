/** Keys of the whole page. Screens add theirs with `shortcut`, which ends with the component. */

export interface Shortcut {
  key: string;
  title: string;
  run: (event: KeyboardEvent) => void;
}

const stack: Shortcut[] = [];

export const shortcuts = (): Shortcut[] => [...new Map(stack.map((one) => [one.key, one])).values()];

/** Add a key while the caller's effect lives: `$effect(() => shortcut("r", "Refresh", refresh))`. */
export function shortcut(key: string, title: string, run: (event: KeyboardEvent) => void): () => void {
  const one = { key, title, run };
  stack.push(one);
  return () => {
    stack.splice(stack.indexOf(one), 1);
  };
}

const typing = (target: EventTarget | null): boolean =>
  target instanceof HTMLElement &&
  (target.isContentEditable || target.matches("textarea, select, input:not([type=checkbox], [type=radio], [type=button], [type=range])"));

addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    if (typing(event.target)) (event.target as HTMLElement).blur();
  } else if (typing(event.target)) return;
  if (document.querySelector("dialog[open]")) return;
  const found = stack.findLast((one) => one.key === event.key);
  if (!found) return;
  event.preventDefault();
  found.run(event);
});
