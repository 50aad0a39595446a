#!/usr/bin/env bash
# What the README and docs/index.md say, done by a newcomer in a fresh environment: each command and
# block as it stands there, and what it has to print. `--here` takes the environment that is active.
# `--pages` runs the blocks of every page, each beside only the packages that the page says to install.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ "${1:-}" != --here ]; then
  python3 -m venv "$work/venv"
  . "$work/venv/bin/activate"
  pip install -q -c constraints.txt .
fi
export HF_HUB_OFFLINE=1
ln -s "$root/examples" "$work/examples"
cd "$work"

# blocks PAGE LANGUAGE: the code blocks of a page, one after the other.
blocks() { awk -v begin="\`\`\`$2" '$0 == begin {on = 1; next} /^```/ {on = 0} on' "$root/$1"; }

# says TEXT...: the output of the last step has each of these.
says() {
  for text in "$@"; do
    grep -qF -- "$text" out || { echo "first_steps: no '$text' in:"; cat out; exit 1; }
  done
}

if [ "${1:-}" = --pages ]; then
  installed=$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
  for page in "$root"/docs/*.md; do
    [ "$(basename "$page")" != sharing.md ] || continue # needs a Hub
    rm -rf "$work/page" && python3 -m venv "$work/page"
    echo "$installed" >"$(echo "$work"/page/lib/python*/site-packages)/installed.pth"
    packages=$(sed -nE "s/.*\`pip install '?([a-z][a-z -]*)'?\`.*/\1/p" "$page")
    [ -z "$packages" ] || "$work/page/bin/pip" install -q -c "$root/constraints.txt" $packages
    "$work/page/bin/python" "$root/tests/helpers/page_blocks.py" "$page" >out 2>&1 ||
      { cat out; echo "first_steps: $page needs more than it says"; exit 1; }
  done
  exit
fi

started=$SECONDS
hf-sparse --version >out
says "hf-sparse "
blocks README.md sh | sed -n '/^python3 -m venv.*quickstart/s/.*&& //p' >first
sh -e first >out
says "sparsity" "dense   perplexity" "sparse  perplexity" "MB on disk" "tokens/s"
echo "first_steps: the README's first command took $((SECONDS - started)) s"

blocks README.md sh | sed -n '/^hf-sparse/,/[^\\]$/p' >commands
sh -e commands >out 2>err || { cat out err; exit 1; }
says "saved in tiny-sparse" "packed layers" "perplexity" "agreement with the dense model" \
  "tiny-sparse as dense:"

blocks docs/index.md python >block.py
python block.py >out 2>err || { cat out err; exit 1; }
says "dense perplexity" "sparse perplexity" "agreement with the dense model"

if hf-sparse prune examples/models/tiny-llama-docs --method magnitude \
  --output examples/models/tiny-llama-docs 2>out; then
  echo "first_steps: a model was overwritten"
  exit 1
fi
says "itself: pass another folder"
echo "first_steps: all of it in $((SECONDS - started)) s"
