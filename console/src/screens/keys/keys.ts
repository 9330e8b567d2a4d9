/** The API's key. */

export interface ApiKey extends Record<string, unknown> {
  id: string;
  name: string;
  owner: string;
  person: string | null;
  scopes: string[];
  created_at: number;
  expires_at: number | null;
  last_used_at: number | null;
  replaced_until: number | null;
  status: "active" | "expired";
  hint: string;
}

export interface IssuedKey extends ApiKey {
  key: string;
  webhook_secret?: string;
}

export const SCOPES = ["inference", "jobs", "admin:read", "admin:operate", "admin:keys", "admin"] as const;
export const DAY_S = 86_400;
