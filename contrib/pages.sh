#!/usr/bin/env bash
# Writes the manual pages and the shells' completion scripts under DIR, laid out as /usr/share has them:
#
#   contrib/pages.sh DIR [NSFS]     NSFS is the command to ask, .venv/bin/nsfs by default
set -euo pipefail
cd "$(dirname "$0")/.."
share=${1:?usage: contrib/pages.sh DIR [NSFS]}
nsfs=${2:-.venv/bin/nsfs}

"$nsfs" man "$share/man/man1"
mkdir -p "$share"/{bash-completion/completions,zsh/site-functions,fish/vendor_completions.d}
"$nsfs" completion bash >"$share/bash-completion/completions/nsfs"
"$nsfs" completion zsh >"$share/zsh/site-functions/_nsfs"
"$nsfs" completion fish >"$share/fish/vendor_completions.d/nsfs.fish"
