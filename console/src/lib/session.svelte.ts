/** Who is signed in, and what they may do. */

export interface SessionInfo {
  name: string;
  role: "viewer" | "member" | "operator" | "admin" | null;
  team: string;
  person: string | null;
  key: string | null;
  scopes: string[];
  csrf_token: string;
}

export type Scope = "inference" | "jobs" | "admin:read" | "admin:operate" | "admin:keys";

export interface SignInWays {
  key: boolean;
  provider: { name: string; url: string } | null;
}

class SessionState {
  /** The session; null: nobody is signed in. */
  info = $state<SessionInfo | null>(null);
  phase = $state<"loading" | "signed-out" | "signed-in" | "ended" | "unreachable">("loading");
  /** Why the session ended, in the API's words. */
  reason = $state("");

  get csrfToken(): string {
    return this.info?.csrf_token ?? "";
  }

  get signedIn(): boolean {
    return this.phase === "signed-in" || this.phase === "ended";
  }

  /** Whether the caller may change what the scope covers. */
  can(scope: Scope): boolean {
    return !this.readOnly && this.has(scope);
  }

  /** Whether the caller may read what the scope covers. */
  has(scope: Scope): boolean {
    return this.info?.scopes.includes(scope) ?? false;
  }

  get readOnly(): boolean {
    return this.info?.role === "viewer";
  }

  /** Members manage their team's keys; `admin:keys` those of all teams. */
  get managesKeys(): boolean {
    const role = this.info?.role;
    return role === "member" || role === "operator" || this.can("admin:keys");
  }

  async load(): Promise<void> {
    try {
      const response = await fetch("/auth/session", { credentials: "same-origin", headers: { accept: "application/json" } });
      if (response.ok) {
        this.info = (await response.json()) as SessionInfo;
        this.phase = "signed-in";
      } else if (response.status === 401) {
        this.info = null;
        this.phase = "signed-out";
      } else {
        this.phase = "unreachable";
        this.reason = ((await response.json()) as { error?: { message?: string } }).error?.message ?? "";
      }
    } catch {
      this.phase = "unreachable";
      this.reason = "";
    }
  }

  /** Note that a request was refused: the page stays, and asks to sign in again. */
  ended(reason: string): void {
    if (this.phase === "signed-in") {
      this.phase = "ended";
      this.reason = reason;
    }
  }

  /** Sign in with an API key. Returns the API's message if it is refused, else null. */
  async signInWithKey(key: string): Promise<string | null> {
    const body = new URLSearchParams({ key, next: "/ui/" });
    const response = await fetch("/auth/login", {
      method: "POST",
      body,
      headers: { accept: "application/json" },
      redirect: "manual",
      credentials: "same-origin",
    });
    if (response.type === "opaqueredirect" || response.ok) {
      await this.load();
      return null;
    }
    const answer = (await response.json().catch(() => null)) as { error?: { message?: string } } | null;
    return answer?.error?.message ?? `The gateway answered with status ${response.status}.`;
  }

  async signOut(): Promise<void> {
    const response = await fetch("/auth/logout", {
      method: "POST",
      headers: { "x-csrf-token": this.csrfToken, accept: "application/json" },
      credentials: "same-origin",
    });
    const answer = (await response.json().catch(() => null)) as { provider_url?: string | null } | null;
    this.info = null;
    this.phase = "signed-out";
    if (answer?.provider_url) location.assign(answer.provider_url);
  }
}

export const session = new SessionState();
