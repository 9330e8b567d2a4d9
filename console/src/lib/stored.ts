/** Small choices that a browser remembers: columns, views. */

export function readStored<T>(key: string, fallback: T): T {
  try {
    const text = localStorage.getItem(`nexus.${key}`);
    return text === null ? fallback : (JSON.parse(text) as T);
  } catch {
    return fallback;
  }
}

export function writeStored(key: string, value: unknown): void {
  try {
    localStorage.setItem(`nexus.${key}`, JSON.stringify(value));
  } catch {
    // Private windows may have no storage.
  }
}
