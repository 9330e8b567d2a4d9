/** The screens, in the order of the navigation. A screen is a folder below `screens/` and a line here. */

import type { Component } from "svelte";
import { match } from "./lib/router.svelte";
import { type Scope, session } from "./lib/session.svelte";
import { strings } from "./strings";

export interface Screen {
  /** Path below `/ui/`. `:name` stands for one part, which the component gets as a prop. */
  path: string;
  title: string;
  /** Where the navigation shows it; none: it is reached from another screen, below whose path it is. */
  group?: "live" | "use" | "manage";
  /** Who sees it; without it, everybody who is signed in. */
  visible?: () => boolean;
  /** Shown without a session. */
  public?: boolean;
  load: () => Promise<{ default: Component<any> }>;
}

const has = (scope: Scope) => () => session.has(scope);

export const screens: Screen[] = [
  { path: "now", title: strings.now.title, group: "live", visible: has("admin:read"), load: () => import("./screens/now/Now.svelte") },
  { path: "hosts", title: strings.hosts.title, group: "live", visible: has("admin:read"), load: () => import("./screens/hosts/Hosts.svelte") },
  { path: "status", title: strings.status.title, public: true, load: () => import("./screens/status/Status.svelte") },
  { path: "queues/:model", title: strings.queue.waiting, visible: has("admin:read"), load: () => import("./screens/queue/Queue.svelte") },
  { path: "models", title: strings.models.title, group: "use", load: () => import("./screens/models/Models.svelte") },
  { path: "models/:model", title: strings.models.title, load: () => import("./screens/models/Model.svelte") },
  { path: "playground", title: strings.playground.title, group: "use", visible: has("inference"), load: () => import("./screens/playground/Playground.svelte") },
  { path: "batches", title: strings.batches.title, group: "use", visible: has("jobs"), load: () => import("./screens/batches/Batches.svelte") },
  { path: "batches/:id", title: strings.batches.title, visible: has("jobs"), load: () => import("./screens/batches/Batch.svelte") },
  { path: "usage", title: strings.usage.title, group: "manage", load: () => import("./screens/usage/Usage.svelte") },
  { path: "keys", title: strings.keys.title, group: "manage", visible: () => session.managesKeys || session.has("admin:keys"), load: () => import("./screens/keys/Keys.svelte") },
  { path: "keys/:id", title: strings.keys.title, visible: () => session.managesKeys || session.has("admin:keys"), load: () => import("./screens/keys/Key.svelte") },
  { path: "teams", title: strings.teams.title, group: "manage", visible: has("admin:keys"), load: () => import("./screens/teams/Teams.svelte") },
  { path: "teams/:id", title: strings.teams.title, visible: has("admin:keys"), load: () => import("./screens/teams/Team.svelte") },
  { path: "people", title: strings.people.title, group: "manage", visible: has("admin:keys"), load: () => import("./screens/people/People.svelte") },
  { path: "audit", title: strings.audit.title, group: "manage", visible: has("admin:read"), load: () => import("./screens/audit/Audit.svelte") },
  { path: "jobs", title: strings.jobs.title, group: "live", visible: () => session.has("jobs") || session.has("admin:read"), load: () => import("./screens/jobs/Jobs.svelte") },
  { path: "jobs/:id", title: strings.jobs.title, visible: () => session.has("jobs") || session.has("admin:read"), load: () => import("./screens/jobs/Job.svelte") },
  { path: "dead-letters", title: strings.deadLetters.title, group: "live", visible: has("admin:read"), load: () => import("./screens/dead-letters/DeadLetters.svelte") },
  { path: "services", title: strings.services.title, group: "manage", visible: has("admin:read"), load: () => import("./screens/services/Services.svelte") },
];

export interface Found {
  screen: Screen;
  params: Record<string, string>;
}

/** Return the screen of a path that the caller may see; null: there is none. */
export function find(path: string): Found | null {
  for (const screen of screens) {
    const params = match(screen.path, path);
    if (params) return isVisible(screen) ? { screen, params } : null;
  }
  return null;
}

export function isVisible(screen: Screen): boolean {
  return screen.public === true || (session.signedIn && (screen.visible?.() ?? true));
}

/** Return the screen that opens first: the first of the navigation that the caller may see. */
export function home(): Screen | undefined {
  return screens.find((screen) => screen.group && isVisible(screen) && !(session.signedIn && screen.public));
}
