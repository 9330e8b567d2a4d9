/** Names of keys and people for screens that get their ids, as far as the caller may list them. */

import { get } from "./api";
import { session } from "./session.svelte";

interface Named {
  id: string;
  name: string;
  email?: string;
}

class Names {
  private found = $state.raw(new Map<string, string>());
  private asked = false;

  /** Return the name of a key or person; its id if the name is unknown. */
  of(id: string | null | undefined): string {
    return id ? (this.found.get(id) ?? id) : "";
  }

  /** Ask for the names, once. What may not be listed, or was revoked, keeps its id. */
  load(): void {
    if (this.asked) return;
    this.asked = true;
    if (session.managesKeys) void this.read("/v1/keys");
    if (session.has("admin:keys")) void this.read("/v1/people");
  }

  private async read(path: string): Promise<void> {
    try {
      const { data } = await get<{ data: Named[] }>(path);
      const found = new Map(this.found);
      for (const one of data) found.set(one.id, one.name || one.email || one.id);
      this.found = found;
    } catch {
      // Names are a courtesy.
    }
  }
}

export const names = new Names();
