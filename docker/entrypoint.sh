#!/bin/sh
# Secrets by file: where NAME_FILE is set, NAME becomes that file's content. Then the command, in this process' place.
set -eu
for name in RECAP_API_KEY RECAP_ADMIN_KEY; do
  eval "file=\${${name}_FILE:-}"
  [ -n "$file" ] || continue
  if [ ! -r "$file" ] || [ ! -s "$file" ]; then
    echo "entrypoint: ${name}_FILE: expected a readable file with a key, got $file as user $(id -u)" >&2
    exit 2
  fi
  export "$name=$(cat "$file")"
done
exec "$@"
