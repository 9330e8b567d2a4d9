import { existsSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig, type Plugin } from "vite";

const APP = "../gateway/console/app";
/** Where `npm run dev` finds a gateway: `NEXUS_URL=http://127.0.0.1:8800 npm run dev`. */
const GATEWAY = process.env.NEXUS_URL ?? "http://127.0.0.1:8800";

/** Replace each built file with its gzip form: the gateway sends these bytes as they are. */
function gzipFiles(): Plugin {
  const visit = (folder: string): void => {
    for (const name of readdirSync(folder)) {
      const path = join(folder, name);
      if (statSync(path).isDirectory()) visit(path);
      else {
        writeFileSync(`${path}.gz`, gzipSync(readFileSync(path), { level: 9 }));
        rmSync(path);
      }
    }
  };
  return { name: "gzip-files", apply: "build", closeBundle: () => (existsSync(APP) ? visit(APP) : undefined) };
}

const proxied = { target: GATEWAY, headers: { origin: GATEWAY } };

export default defineConfig({
  base: "/ui/",
  plugins: [svelte(), gzipFiles()],
  build: {
    outDir: APP,
    emptyOutDir: true,
    target: "es2022",
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0,
    reportCompressedSize: false,
    rolldownOptions: { checks: { bundlerTimings: false, pluginTimings: false } },
  },
  server: { proxy: { "/v1": proxied, "/auth": proxied, "/health": proxied } },
});
