#!/bin/sh
# Installs the system packages that the build needs, and only those that are missing (Debian, Ubuntu).
set -eu
PYTHON=${PYTHON:-python3}

missing=""
need() { missing="$missing $1"; }

if ! command -v "$PYTHON" >/dev/null; then
    need python3; need python3-venv; need python3-dev
else
    "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || need python3-venv
    "$PYTHON" -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' \
        || need python3-dev
fi
command -v g++ >/dev/null || need g++
command -v pkg-config >/dev/null || need pkg-config
header() { ls /usr/include/"$1" /usr/include/*/"$1" /usr/local/include/"$1" >/dev/null 2>&1; }
# pkg-config knows libraries in other places; without it the usual ones are looked at.
pkg-config --exists libjpeg 2>/dev/null || { ! command -v pkg-config >/dev/null && header jpeglib.h; } || need libjpeg-dev
pkg-config --exists libdeflate 2>/dev/null || { ! command -v pkg-config >/dev/null && header libdeflate.h; } || need libdeflate-dev

[ -z "$missing" ] && exit 0
if ! command -v apt-get >/dev/null; then
    echo "polydpo_fast: please install what these Debian packages hold:$missing" >&2
    exit 1
fi
SUDO=""
if [ "$(id -u)" -ne 0 ]; then
    SUDO="sudo"
    command -v sudo >/dev/null || { echo "polydpo_fast: as root, run: apt-get install$missing" >&2; exit 1; }
fi
echo "Installing system packages:$missing"
$SUDO apt-get update -q
# shellcheck disable=SC2086 # a list of words
$SUDO env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
