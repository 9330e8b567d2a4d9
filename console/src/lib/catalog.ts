/** The catalog's models, and requests to their endpoints as each endpoint takes them: JSON or a form. */

import type { Schema } from "../kit/SchemaForm.svelte";
import { get, modelPath, send } from "./api";
import { EventParser, type ServerEvent } from "./events";

export interface Endpoint {
  content_type: string;
  parameters: Schema;
  example: Record<string, unknown>;
}

export interface CatalogModel {
  id: string;
  capabilities: string[];
  owned_by: string;
  state: "loaded" | "loading" | "cold" | "ready" | "held" | "paused" | "offline";
  workers: { id: string; backend: string; state: string; slots: number; load?: string }[];
  slots: number;
  limitations: string[];
  modalities?: { input: string[]; output: string[] };
  context_length?: number;
  embedding_length?: number;
  voices?: string[];
  alias_for?: string[];
  resolves_to?: string | null;
  differing?: string[];
  problems?: string[];
  /** Of an entry in a list: the key of its endpoints. */
  descriptor?: string;
}

export interface CatalogEntry extends CatalogModel {
  endpoints: Record<string, Endpoint>;
}

export interface CatalogList {
  data: CatalogModel[];
  descriptors: Record<string, Record<string, Endpoint>>;
}

export const listCatalog = (signal?: AbortSignal): Promise<CatalogList> => get<CatalogList>("/v1/catalog", {}, signal);
export const getEntry = (model: string, signal?: AbortSignal): Promise<CatalogEntry> =>
  get<CatalogEntry>(`/v1/catalog/${modelPath(model)}`, {}, signal);

export const isLive = (model: CatalogModel): boolean => model.state !== "offline";
export const stateTone = (state: string): "good" | "warn" | "bad" | "neutral" =>
  state === "loaded" || state === "ready" ? "good" : state === "loading" || state === "paused" || state === "held" ? "warn" : state === "offline" ? "bad" : "neutral";

export interface Call {
  path: string;
  contentType: string;
  body: Record<string, unknown>;
}

/** Return the bytes of an example's file. */
export function fileOf(base64: string, mediaType: string, name: string): File {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const type = mediaType === "audio/*" ? "audio/wav" : mediaType.endsWith("/*") ? "image/png" : mediaType;
  return new File([bytes], `${name}.${type.split("/")[1]}`, { type });
}

/** Return an endpoint's example as a request. */
export function exampleCall(path: string, endpoint: Endpoint): Call {
  const properties = endpoint.parameters.properties ?? {};
  const body = Object.fromEntries(
    Object.entries(endpoint.example).map(([name, value]) => {
      const schema = properties[name];
      const media = schema?.contentMediaType ?? schema?.anyOf?.find((part) => part.contentMediaType)?.contentMediaType;
      return [name, media && typeof value === "string" ? fileOf(value, media, name) : value];
    }),
  );
  return { path, contentType: endpoint.content_type, body };
}

function form(body: Record<string, unknown>): FormData {
  const data = new FormData();
  for (const [name, value] of Object.entries(body)) {
    for (const one of Array.isArray(value) && value.some((part) => part instanceof File) ? value : [value]) {
      if (one instanceof File) data.append(name, one, one.name);
      else if (Array.isArray(one)) one.forEach((part) => data.append(`${name}[]`, String(part)));
      else if (one !== undefined && one !== null) data.append(name, typeof one === "object" ? JSON.stringify(one) : String(one));
    }
  }
  return data;
}

/** Send a request, and return its response whatever its type. Throws ApiError. */
export function sendCall(call: Call, { signal, prefer = "" }: { signal?: AbortSignal; prefer?: string } = {}): Promise<Response> {
  const body = call.contentType === "application/json" ? call.body : form(call.body);
  return send(call.path, { method: "POST", body, signal, timeoutMs: 0, headers: prefer ? { prefer } : {} });
}

export interface Job {
  id: string;
  status: string;
  queue_position: number | null;
  eta_seconds: number | null;
  error: { message: string; param?: string | null } | null;
}

/** Submit a request as a job. `later`: in the lane for work that may wait. */
export async function submitJob(call: Call, { later = false }: { later?: boolean } = {}): Promise<Job> {
  const body = later ? { ...call.body, service_tier: "flex" } : call.body;
  return (await (await sendCall({ ...call, body }, { prefer: "respond-async" })).json()) as Job;
}

/** Send a request for a stream, and call `onEvent` for each event of it. `onPosition` gets the place in the queue. Throws ApiError. */
export async function stream(
  call: Call,
  { signal, onEvent, onPosition }: { signal?: AbortSignal; onEvent: (event: ServerEvent) => void; onPosition?: (position: number) => void },
): Promise<void> {
  const response = await sendCall(call, { signal });
  const parser = new EventParser(onEvent, (comment) => {
    const position = /queued position=(\d+)/.exec(comment);
    if (position) onPosition?.(Number(position[1]));
  });
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    parser.feed(value);
  }
}
