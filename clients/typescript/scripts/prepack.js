/**
 * Creates the files of the published package that are not in the source tree: the protocol buffers,
 * the license and the TypeScript declarations. `--clean` removes them.
 */

import { execFileSync } from 'node:child_process';
import { cpSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';

const packagePath = (/** @type {string} */ path) =>
  fileURLToPath(new URL(`../${path}`, import.meta.url));

for (const generated of ['proto', 'types', 'LICENSE'])
  rmSync(packagePath(generated), { recursive: true, force: true });

if (!process.argv.includes('--clean')) {
  const filter = (/** @type {string} */ path) => !/\.rs$|\.toml$|[\\/](src|internal)$/.test(path);
  cpSync(packagePath('../../proto'), packagePath('proto'), { recursive: true, filter });
  cpSync(packagePath('../../LICENSE'), packagePath('LICENSE'));
  const tsc = createRequire(import.meta.url).resolve('typescript/bin/tsc');
  const args = [tsc, '--project', packagePath('tsconfig.build.json')];
  execFileSync(process.execPath, args, { stdio: 'inherit' });
}
