#!/usr/bin/env bash
# Installs Chromium and its driver for the tests of reports, where apt-get can (Debian, Ubuntu) and they are missing.
set -euo pipefail
if command -v chromium > /dev/null && command -v chromedriver > /dev/null; then exit 0; fi
echo "installing Chromium" >&2
{ apt-get install --yes --quiet chromium chromium-driver || { apt-get update --quiet && apt-get install --yes --quiet \
  chromium chromium-driver; }; } > /dev/null
