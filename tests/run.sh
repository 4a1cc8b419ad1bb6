#!/bin/bash
# Sets up and passes all tests: formatting, lints, documentation, unit and property tests, labs of network namespaces on
# this kernel, user-mode Linux, a virtual machine, and the demo. Needs root on Debian 12 with Rust.
#
# Environment: NFQD_TESTS_POLICIES, how many random policies the three oracles are compared under, with 60 frames each (180
# on this kernel, 60 in user-mode Linux, which is slower); NFQD_TESTS_CONNECTIONS, how many connections a pool holds at once
# (10 000 and 500); NFQD_TESTS_SEED, the beginning of the randomness (1).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ "$(id -u)" = 0 ] || {
    echo "tests/run.sh: needs root; run it with sudo" >&2
    exit 3
}
PATH=$PATH:${SUDO_USER:+$(getent passwd "$SUDO_USER" | cut -d: -f6)/.cargo/bin:}/root/.cargo/bin
command -v cargo > /dev/null || {
    echo "tests/run.sh: needs Rust's cargo; install it from https://rustup.rs" >&2
    exit 3
}

step() { printf '\n== %s\n' "$*"; }

step "packages"
packages="gcc libc6-dev pkg-config libnftnl-dev libmnl-dev nftables iproute2 iputils-ping procps kmod util-linux socat
    user-mode-linux qemu-system-x86 busybox-static cpio shellcheck"
missing=""
for package in $packages; do
    dpkg-query -W -f '${Status}' "$package" 2> /dev/null | grep -q "ok installed" || missing="$missing $package"
done
apt-get update -q > /dev/null
if [ -n "$missing" ]; then
    echo "installing:$missing"
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing > /dev/null
fi

step "shell scripts"
shellcheck br-netfilter.sh fuzz/run tests/run.sh tests/uml/run tests/uml/init tests/vm/prepare tests/vm/init .ci/run

step "formatting, lints, documentation"
cargo fmt --all --check
cargo clippy --quiet --workspace --all-targets --locked -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --no-deps --locked

step "the guest's program, static, and its virtual machine"
RUSTFLAGS="-C target-feature=+crt-static" \
    cargo build --quiet --release --locked -p nfqd-guest --target x86_64-unknown-linux-gnu
target=${CARGO_TARGET_DIR:-$PWD/target}
tests/vm/prepare "$target/vm" "$target/x86_64-unknown-linux-gnu/release/nfqd-guest"

export NFQD_TESTS_NEED_ROOT=1 NFQD_TESTS_VM=$target/vm

step "this kernel: $(uname -r)"
cargo build --quiet --workspace --locked
NFQD_TESTS_POLICIES=${NFQD_TESTS_POLICIES:-180} cargo test --quiet --workspace --locked

step "user-mode Linux: the nft queue expression"
# A guest has one core, so there are two of them.
in_guest() {
    NFQD_TESTS_POLICIES=${NFQD_TESTS_POLICIES:-60} NFQD_TESTS_CONNECTIONS=${NFQD_TESTS_CONNECTIONS:-500} \
        NFQD_TESTS_STEER=native CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=$PWD/tests/uml/run \
        cargo test --locked -p nfqd-rules -p nfqd-tests "$@" -- --test-threads 1
}
other=$(mktemp)
in_guest --test kernel --test oracles --test traffic > "$other" 2>&1 &
guest=$!
passed=yes
in_guest --test lab --test pools || passed=no
wait "$guest" || passed=no
cat "$other"
rm "$other"
[ "$passed" = yes ] || exit 1

step "the demo"
./br-netfilter.sh demo
if pgrep -f '/nfqd-demo[.]' > /dev/null; then
    echo "tests/run.sh: the demo has left a process behind" >&2
    exit 1
fi

step "all passed"
