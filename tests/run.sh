#!/bin/bash
# Runs the tests on Debian 12 with Rust.
#
#   tests/run.sh [DEPTH...]
#
#   unit   formatting, lints, documentation, unit and property tests; needs no root
#   netns  the labs of network namespaces, on this kernel; without root in a user namespace, where that is allowed
#   uml    the same labs in user-mode Linux, whose kernel has the nft queue expression
#   vm     a virtual machine that writes commands into its ivshmem device
#   demo   br-netfilter.sh demo
#   chaos  ten minutes of everything that goes wrong on a host, under load (netns and uml have a minute of it)
#   package  the Debian package, installed in a clean root, and what systemd says of the units
#   browser  the page of nfqd serve in headless Chromium
#   aarch64  nfqd-guest for aarch64, built in a root of Debian unstable, whose compiler is new enough, and run by emulation
#   all    all of them but chaos, package, browser and aarch64 (the default)
#
# Missing Debian packages are installed as root, and named otherwise.
#
# Environment: NFQD_TESTS_POLICIES, the number of random policies under which the three oracles are compared, with 60
# frames each (180; 60 in user-mode Linux); NFQD_TESTS_CONNECTIONS, the connections that a pool holds at once (10000; 500
# there, 2000 in a user namespace); NFQD_TESTS_SEED, the seed of the randomness (1); NFQD_TESTS_CHAOS_SECONDS, the length
# of the chaos (60; 600 in the depth of that name).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Minutes and seconds since the start come first.
step() { printf '\n== %d:%02d %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

die() {
    echo "tests/run.sh: $*" >&2
    exit 3
}

is_root() { [ "$(id -u)" = 0 ]; }
need_root() { is_root || die "the depth '$1' needs root; run it with sudo"; }

# Installs the packages that are missing.
need_packages() {
    local missing=()
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2> /dev/null | grep -q "ok installed" || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    is_root || die "missing: ${missing[*]}; install them with: sudo apt-get install ${missing[*]}"
    step "packages: ${missing[*]}"
    apt-get update -q > /dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}" > /dev/null
}

lab_packages="nftables iproute2 iputils-ping procps kmod util-linux python3"

unit() {
    # libclang is for the feature peers alone.
    need_packages shellcheck libclang1-14 spin gcc libc6-dev
    step "shell scripts"
    shellcheck br-netfilter.sh fuzz/run packaging/build packaging/debian/* tests/run.sh tests/models/run tests/newcomer tests/uml/run tests/uml/init tests/vm/prepare tests/vm/init .ci/run
    step "formatting, lints, documentation"
    cargo fmt --all --check
    cargo clippy --quiet --workspace --all-targets --locked -- -D warnings
    cargo clippy --quiet -p nfqd-tests --bin bench --features peers --locked -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --no-deps --locked
    step "models"
    tests/models/run
    step "unit and property tests"
    cargo test --quiet --workspace --locked
}

# The tests that need the privilege, except for the virtual machine's.
netns() {
    # shellcheck disable=SC2086
    need_packages $lab_packages libvirt-clients libxml2-utils
    step "labs on this kernel: $(uname -r)"
    cargo build --quiet --workspace --all-targets --locked
    local labs=(env NFQD_TESTS_POLICIES="${NFQD_TESTS_POLICIES:-180}" cargo test --locked -p nfqd-rules -p nfqd-tests --test chaos --test docs --test doorbell --test firewall --test kernel --test host --test lab --test lifecycle
        --test health --test networks --test operations --test oracles --test pools --test ring --test supervisor --test traffic -- --ignored)
    if is_root; then
        "${labs[@]}"
        return
    fi
    unshare --user --map-root-user --net --mount true 2> /dev/null \
        || die "the depth 'netns' needs root, or user namespaces, which this kernel does not allow"
    [ -w /dev/net/tun ] || die "the depth 'netns' needs root, or permission to write to /dev/net/tun"
    # Root of a user namespace cannot force socket buffers: the transactions of one test do not fit into the default ones,
    # and a burst of many connections overruns them.
    echo "in a user namespace: with 2000 connections a pool, and without a test that needs real root:" \
        "changes_of_a_guest_are_not_interference"
    NFQD_TESTS_CONNECTIONS=${NFQD_TESTS_CONNECTIONS:-2000} \
        PATH=$PATH:/usr/sbin:/sbin unshare --user --map-root-user --net --mount \
        sh -c 'mount -t tmpfs tmpfs /run && exec "$@"' sh "${labs[@]}" --skip changes_of_a_guest_are_not_interference
}

uml() {
    need_root uml
    # shellcheck disable=SC2086
    need_packages $lab_packages user-mode-linux
    step "labs in user-mode Linux, with the nft queue expression"
    cargo build --quiet --workspace --all-targets --locked
    in_guest() {
        NFQD_TESTS_POLICIES=${NFQD_TESTS_POLICIES:-60} NFQD_TESTS_CONNECTIONS=${NFQD_TESTS_CONNECTIONS:-500} \
            NFQD_TESTS_CHAOS_CONNECTIONS=${NFQD_TESTS_CHAOS_CONNECTIONS:-300} NFQD_TESTS_STEER=native CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=$PWD/tests/uml/run \
            cargo test --locked -p nfqd-rules -p nfqd-tests "$@" -- --ignored --test-threads 1
    }
    # A guest has one core, so two guests run in parallel.
    local log passed=yes
    log=$(mktemp)
    # This kernel may have no VLAN filtering; that one has.
    in_guest --test kernel --test networks --test oracles --test pools --test traffic --test vlans --test vsock > "$log" 2>&1 &
    local guest=$!
    in_guest --test chaos --test firewall --test health --test lab --test lifecycle || passed=no
    wait "$guest" || passed=no
    cat "$log"
    rm "$log"
    [ "$passed" = yes ]
}

vm() {
    need_root vm
    # shellcheck disable=SC2086
    need_packages $lab_packages qemu-system-x86 busybox-static cpio
    step "a virtual machine"
    # The guest's kernel is a package that is downloaded, not installed.
    [ -e "$target/vm/kernel" ] || apt-get update -q > /dev/null
    RUSTFLAGS="-C target-feature=+crt-static" \
        cargo build --quiet --release --locked -p nfqd-guest --target x86_64-unknown-linux-gnu
    tests/vm/prepare "$target/vm" "$target/x86_64-unknown-linux-gnu/release/nfqd-guest"
    NFQD_TESTS_VM=$target/vm cargo test --locked -p nfqd-tests --test vm -- --ignored
}

demo() {
    need_root demo
    # shellcheck disable=SC2086
    need_packages $lab_packages socat
    step "the demo"
    ./br-netfilter.sh demo
    if pgrep -f '/nfqd-demo[.]' > /dev/null; then
        echo "tests/run.sh: the demo has left a process behind" >&2
        exit 1
    fi
}

chaos() {
    need_root chaos
    # shellcheck disable=SC2086
    need_packages $lab_packages
    step "chaos"
    NFQD_TESTS_CHAOS_SECONDS=${NFQD_TESTS_CHAOS_SECONDS:-600} \
        cargo test --locked -p nfqd-tests --test chaos -- --ignored --nocapture
}

package() {
    need_root package
    need_packages debootstrap lowdown systemd iproute2 rpm
    step "units"
    # 0 is the best exposure, 10 the worst; the threshold is in tenths.
    systemd-analyze security --offline=true --threshold=30 packaging/systemd/nfqd.service > /dev/null
    systemd-analyze security --offline=true --threshold=20 packaging/systemd/nfqd-serve.service > /dev/null
    step "the package"
    cargo install --quiet --locked --version '^3' --root "$target/tools" cargo-deb
    PATH=$PATH:$target/tools/bin packaging/build "$target/nfqd.deb"
    cargo install --quiet --locked --version '^0.21' --root "$target/tools" cargo-generate-rpm
    PATH=$PATH:$target/tools/bin packaging/build "$target/nfqd.rpm"
    rpm -qpl "$target/nfqd.rpm" | grep -c -x -e /usr/bin/nfqd -e /etc/nfqd/nfqd.toml -e /usr/lib/systemd/system/nfqd.service | grep -x 3
    step "a clean root"
    local root
    root=$(mktemp -d)
    # shellcheck disable=SC2064
    trap "rm -rf '$root'" EXIT
    debootstrap --variant=minbase --include=ca-certificates bookworm "$root" > /dev/null
    cp "$target/nfqd.deb" tests/captures/*.pcap "$root/tmp/"
    local begin=$SECONDS
    chroot "$root" sh -c 'apt-get -q -y --no-install-recommends install /tmp/nfqd.deb > /dev/null'
    unshare --mount --net tests/newcomer "$root"
    local elapsed=$((SECONDS - begin))
    if pgrep -f nfqd-newcomer > /dev/null; then
        echo "tests/newcomer has left a process behind" >&2
        exit 1
    fi
    echo "a newcomer's first success, from the package to the page: $elapsed s"
    [ "$elapsed" -lt 300 ] || { echo "a newcomer needs more than five minutes" >&2; exit 1; }
    chroot "$root" nfqd --version
    chroot "$root" nfqd check /usr/share/doc/nfqd/examples/firewall.commands
    chroot "$root" nfqd explain X 12:13:14:15:16:17 > /dev/null
    for capture in "$root"/tmp/*.pcap; do
        chroot "$root" nfqd replay "/tmp/${capture##*/}" --commands /usr/share/doc/nfqd/examples/firewall.commands > /dev/null
    done
    chroot "$root" getent group nfqd
    # Without documentation, the root of a minimal system has no manual pages either.
    local page
    for page in man1/nfqd-guest.1 man5/nfqd.toml.5 man7/nfqd-commands.7 man8/nfqd-trace.8; do
        dpkg-deb --fsys-tarfile "$target/nfqd.deb" | tar -xO "./usr/share/man/$page.gz" | gzip -d | tr '\n' ' ' | grep -c '[.]S[Hh] NAME'
    done
    chroot "$root" grep -q 'shm' /etc/nfqd/nfqd.toml
    # No systemd runs there, so the units are verified, not started.
    chroot "$root" sh -c 'test -x /usr/sbin/br-netfilter.sh && test -f /lib/systemd/system/nfqd.service'
    code=0
    chroot "$root" nfqd status > /dev/null 2>&1 || code=$?
    [ "$code" = 3 ] || { echo "nfqd status without a daemon ended with $code, not 3" >&2; exit 1; }
}

browser() {
    need_root browser
    # shellcheck disable=SC2086
    need_packages $lab_packages chromium chromium-driver
    step "the page in a browser"
    cargo test --locked -p nfqd-tests --test browser -- --ignored
}

aarch64() {
    need_root aarch64
    need_packages debootstrap qemu-user-static
    local root=$target/aarch64 triple=aarch64-unknown-linux-gnu
    step "a root with a compiler for aarch64"
    if ! [ -e "$root/ready" ]; then
        rm -rf "$root"
        debootstrap --variant=minbase --include=ca-certificates sid "$root" > /dev/null
        chroot "$root" dpkg --add-architecture arm64
        # A mirror may be some weeks behind.
        chroot "$root" apt-get -q -o Acquire::Check-Valid-Until=false update > /dev/null
        chroot "$root" apt-get -q -y --no-install-recommends install rustc cargo gcc libc6-dev libstd-rust-dev:arm64 \
            gcc-aarch64-linux-gnu libc6-dev-arm64-cross > /dev/null
        touch "$root/ready"
    fi
    step "nfqd-guest for aarch64"
    cargo fetch --quiet --locked
    rm -rf "$root/source" && mkdir -p "$root/source" "$root/root/.cargo"
    git archive HEAD | tar -x -C "$root/source"
    cp -r "${CARGO_HOME:-$HOME/.cargo}/registry" "$root/root/.cargo/"
    chroot "$root" env HOME=/root RUSTFLAGS="-C target-feature=+crt-static" \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
        sh -c "cd /source && cargo build --quiet --release --locked --offline -p nfqd-guest --target $triple"
    local guest=$root/source/target/$triple/release/nfqd-guest
    qemu-aarch64-static "$guest" --version
    [ "$(stat -c %s "$guest")" -lt 2000000 ] || { echo "nfqd-guest has more than 2 MB" >&2; exit 1; }
    # A region that nobody reads.
    local code=0
    truncate -s 1M "$root/region"
    qemu-aarch64-static "$guest" --shm "$root/region" --timeout 0.2 Q > /dev/null 2>&1 || code=$?
    [ "$code" = 3 ] || { echo "nfqd-guest without a host ended with $code, not 3" >&2; exit 1; }
}

depths=()
for depth in "${@:-all}"; do
    case $depth in
        all) depths+=(unit netns uml vm demo) ;;
        unit | netns | uml | vm | demo | chaos | package | browser | aarch64) depths+=("$depth") ;;
        -h | --help)
            sed -n '2,22s/^# \{0,1\}//p' "$0"
            exit
            ;;
        *)
            echo "tests/run.sh: '$depth' is not a depth; write unit, netns, uml, vm, demo, chaos, package, browser, aarch64 or all" >&2
            exit 2
            ;;
    esac
done
if [[ " ${depths[*]} " =~ " uml "|" vm "|" demo "|" chaos "|" package "|" browser "|" aarch64 " ]]; then
    need_root "${depths[*]}"
fi

PATH=$PATH:${SUDO_USER:+$(getent passwd "$SUDO_USER" | cut -d: -f6)/.cargo/bin:}${HOME:-/root}/.cargo/bin
command -v cargo > /dev/null || die "cargo is not here; install Rust from https://rustup.rs"
target=${CARGO_TARGET_DIR:-$PWD/target}
# Needed to build anything.
need_packages gcc libc6-dev pkg-config libnftnl-dev libmnl-dev
for depth in "${depths[@]}"; do
    "$depth"
done
step "passed: ${depths[*]}"
