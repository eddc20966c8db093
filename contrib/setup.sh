#!/usr/bin/env bash
# Sets this machine up to build, run, test and measure nsfs: Debian packages that are missing, and .venv with nsfs
# (editable) and what it needs.
#
# Idempotent, and done in a blink when there is nothing to do. Services of the host stay as they are: none is started,
# stopped, restarted or enabled by what is installed here (see `install_quietly`), then or at the next boot.
set -euo pipefail
cd "$(dirname "$0")/.."

POLICY=/usr/sbin/policy-rc.d
KEPT=$POLICY.kept-by-nsfs-setup

PACKAGES=(
    gcc libc6-dev pkg-config libfuse3-dev fuse3 python3-dev python3-venv # pyfuse3
    ca-certificates docker-registry                                      # a real registry
    debootstrap                                                          # real images
    systemd-container                                                    # a machine that boots with our units
    erofs-utils umoci                                                    # other opinions on what we write
    containerd runc runsc busybox-static                                 # real containers, of a small image
)
command -v go >/dev/null || PACKAGES+=(golang-go) # eStargz layers that are not of our own making

missing() {
    local name
    for name in "$@"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null) == installed ]] || echo "$name"
    done
}

forget_policy() {
    rm -f "$POLICY"
    if [[ -e $KEPT ]]; then mv "$KEPT" "$POLICY"; fi
}

# policy-rc.d forbids starts and restarts. The two wrappers in front of dpkg's PATH let new units and init scripts be
# known to the system without being enabled. All of it goes when this script ends; should it be killed, the policy has
# no effect from then on, and the next run takes it away.
install_quietly() {
    local stubs
    stubs=$(mktemp -d)
    trap 'forget_policy; rm -rf "'"$stubs"'"' EXIT
    if [[ -e $POLICY ]]; then mv "$POLICY" "$KEPT"; fi
    printf '#!/bin/sh\n# nsfs contrib/setup.sh, while it installs packages\nkill -0 %d 2>/dev/null && exit 101\nexit 0\n' $$ >"$POLICY"
    cat >"$stubs/deb-systemd-helper" <<'EOF'
#!/bin/sh
for word; do
    case $word in
        was-enabled) exit 1 ;;
        enable) exit 0 ;;
        -*) ;;
        *) break ;;
    esac
done
exec /usr/bin/deb-systemd-helper "$@"
EOF
    cat >"$stubs/update-rc.d" <<'EOF'
#!/bin/sh
[ "$2" != defaults ] || set -- "$1" defaults-disabled
exec /usr/sbin/update-rc.d "$@"
EOF
    chmod 755 "$POLICY" "$stubs" "$stubs"/*
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends --no-upgrade \
        -o "DPkg::Path=$stubs:/usr/sbin:/usr/bin:/sbin:/bin" "$@"
    trap - EXIT
    forget_policy
    rm -rf "$stubs"
}

install_packages() {
    local wanted
    mapfile -t wanted < <(missing "${PACKAGES[@]}")
    ((${#wanted[@]})) || return 0
    if ((EUID != 0)); then
        echo "setup.sh: packages are missing, and only root installs packages: ${wanted[*]}" >&2
        return 4
    fi
    echo "installing: ${wanted[*]}"
    install_quietly "${wanted[@]}"
}

# The system's own first: one that lies in somebody's home makes a .venv that nobody else can run.
find_python() {
    local python
    for python in /usr/bin/python3 python3; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    echo "setup.sh: no Python 3.11 or newer on PATH" >&2
    return 9
}

# The stamp says what .venv was made from: another pyproject.toml, another place or another Python make it anew or again.
install_venv() {
    local stamp
    stamp="$PWD $(find_python) $(sha256sum <pyproject.toml)"
    if [[ -x .venv/bin/nsfs && $(cat .venv/.stamp 2>/dev/null) == "$stamp" ]]; then return; fi
    if ! .venv/bin/python -c '' 2>/dev/null || [[ ! -x .venv/bin/pip ]]; then
        rm -rf .venv
        "$(find_python)" -m venv .venv
    fi
    .venv/bin/python -m pip install -q --disable-pip-version-check 'pip>=25.1'
    .venv/bin/python -m pip install -q --disable-pip-version-check --group dev -e .
    echo "$stamp" >.venv/.stamp
}

if grep -qs 'nsfs contrib/setup.sh' "$POLICY"; then forget_policy; fi
install_packages
install_venv
