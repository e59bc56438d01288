/**
 * Makes what the published package has and the source tree has not: the protocol buffers, the
 * licence and the TypeScript declarations. With `--clean` it removes them again.
 */

import { execFileSync } from 'node:child_process';
import { cpSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';

const here = (/** @type {string} */ path) => fileURLToPath(new URL(`../${path}`, import.meta.url));

for (const made of ['proto', 'types', 'LICENSE'])
  rmSync(here(made), { recursive: true, force: true });

if (!process.argv.includes('--clean')) {
  const filter = (/** @type {string} */ path) => !/\.rs$|\.toml$|[\\/](src|internal)$/.test(path);
  cpSync(here('../../proto'), here('proto'), { recursive: true, filter });
  cpSync(here('../../LICENSE'), here('LICENSE'));
  const tsc = createRequire(import.meta.url).resolve('typescript/bin/tsc');
  const args = [tsc, '--project', here('tsconfig.build.json')];
  execFileSync(process.execPath, args, { stdio: 'inherit' });
}
