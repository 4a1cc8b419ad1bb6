#!/bin/bash
# Prepares a KVM host's bridge for nfqd, and undoes that.
#
#   br-netfilter.sh [up]      load modules, create or adopt the bridge, set the sysctls that nfqd's steering needs
#   br-netfilter.sh down      undo what up did, nothing else
#   br-netfilter.sh status    what is set, what is missing (exit code 1 if anything is)
#   br-netfilter.sh demo      nfqd in a lab of network namespaces: each command with its effect
#
# Environment: BRIDGE (kvmbr0), PORTS ("tap0 eth1"), STEER (auto, native or br-netfilter), RECORD (the file in which up notes
# what it did; /run/br-netfilter.record).
#
# Exit codes: 0 done; 1 the input is wrong, or something is missing or failed; 2 usage; 3 system error.
set -euo pipefail

BRIDGE=${BRIDGE:-kvmbr0}
PORTS=${PORTS:-}
STEER=${STEER:-auto}
RECORD=${RECORD:-/run/br-netfilter.record}
MODULES="bridge nf_tables nfnetlink_queue nft_queue br_netfilter nft_compat xt_NFQUEUE"
SYSCTLS="bridge-nf-call-iptables bridge-nf-call-ip6tables bridge-nf-filter-vlan-tagged"

say() { printf '%s\n' "$*"; }

die() {
    code=$1
    shift
    printf 'br-netfilter.sh: %s\n' "$*" >&2
    exit "$code"
}

need_root() {
    [ "$(id -u)" = 0 ] || die 3 "needs root; run it with sudo"
    command -v ip > /dev/null || die 3 "needs the command 'ip'; install the package iproute2"
}

check_names() {
    for name in "$BRIDGE" $PORTS; do
        [[ $name =~ ^[A-Za-z0-9_.:-]{1,15}$ ]] || die 1 "'$name' is not an interface name; BRIDGE and PORTS take names like kvmbr0"
    done
    case $STEER in
        auto | native | br-netfilter) ;;
        *) die 1 "STEER is '$STEER'; write auto, native or br-netfilter" ;;
    esac
}

is_bridge() { ip -d link show dev "$1" 2> /dev/null | grep -qw bridge && ip -o link show type bridge | grep -q ": $1:"; }
master_of() { ip -o link show dev "$1" 2> /dev/null | sed -n 's/.* master \([^ ]*\) .*/\1/p'; }
is_loaded() { grep -qs "^$1 " /proc/modules; }
sysctl_file() { echo "/proc/sys/net/bridge/$1"; }

# Whether the kernel has the nft queue expression in the bridge family: tried in a network namespace of its own.
has_native() {
    command -v nft > /dev/null || return 1
    unshare --net nft -f - 2> /dev/null << 'NFT'
table bridge probe {
    chain probe {
        queue flags bypass to 0
    }
}
NFT
}

# Prints the queue path: native, br-netfilter, or the one that STEER names.
queue_path() {
    if [ "$STEER" != auto ]; then
        echo "$STEER"
    elif has_native; then
        echo native
    else
        echo br-netfilter
    fi
}

# Prints family, table and name of each chain that drops forwarded packets by its policy and has no rule that accepts
# bridged ones: with bridge-nf-call-iptables, bridged packets pass there as well.
forward_drops() {
    command -v nft > /dev/null || return 0
    [ "$(cat "$(sysctl_file bridge-nf-call-iptables)" 2> /dev/null)" = 1 ] || return 0
    nft list chains 2> /dev/null | awk '
        $1 == "table" { family = $2; table = $3 }
        $1 == "chain" { chain = $2 }
        /hook forward/ && /policy drop/ && family ~ /^(ip|ip6|inet)$/ { print family, table, chain }' \
        | while read -r family table chain; do
            nft list chain "$family" "$table" "$chain" 2> /dev/null \
                | grep -q "iifname \"$BRIDGE\" oifname \"$BRIDGE\".* accept" || echo "$family $table $chain"
        done
}

# Returns the rule that lets bridged packets pass such a chain.
forward_rule() { printf "nft insert rule %s iifname %s oifname %s accept" "$1" "$BRIDGE" "$BRIDGE"; }

# Notes what up did, newest first, so that down undoes it in that order.
note() {
    { echo "$*"; cat "$RECORD" 2> /dev/null || true; } > "$RECORD.new"
    mv "$RECORD.new" "$RECORD"
}

up() {
    need_root
    check_names
    for port in $PORTS; do
        ip link show dev "$port" > /dev/null 2>&1 || die 1 "there is no interface '$port'; PORTS names the ports of the bridge"
        master=$(master_of "$port")
        [ -z "$master" ] || [ "$master" = "$BRIDGE" ] || die 1 "'$port' is a port of '$master'; remove it from there first"
    done
    if ip link show dev "$BRIDGE" > /dev/null 2>&1 && ! is_bridge "$BRIDGE"; then
        die 1 "there is an interface '$BRIDGE' that is not a bridge; choose another name with BRIDGE="
    fi

    # A kernel without modules has a feature built in, or not at all.
    if [ -e /proc/modules ] && command -v modprobe > /dev/null; then
        for module in $MODULES; do
            if is_loaded "$module"; then
                say "module $module: already loaded"
            elif modprobe -q "$module" 2> /dev/null && is_loaded "$module"; then
                note "module $module"
                say "module $module: loaded"
            fi
        done
    fi

    if is_bridge "$BRIDGE"; then
        say "bridge $BRIDGE: already there"
    else
        ip link add name "$BRIDGE" type bridge || die 3 "this kernel has no bridges (CONFIG_BRIDGE, module bridge)"
        note "bridge $BRIDGE"
        say "bridge $BRIDGE: created"
    fi
    ip link set dev "$BRIDGE" up
    for port in $PORTS; do
        if [ "$(master_of "$port")" = "$BRIDGE" ]; then
            say "port $port: already on $BRIDGE"
        else
            ip link set dev "$port" master "$BRIDGE"
            note "port $port $BRIDGE"
            say "port $port: on $BRIDGE"
        fi
        ip link set dev "$port" up
    done

    path=$(queue_path)
    say "steering: $path"
    [ "$path" = br-netfilter ] || return 0
    [ -e "$(sysctl_file bridge-nf-call-iptables)" ] \
        || die 3 "this kernel has neither the nft queue expression (module nft_queue) nor br_netfilter; nfqd needs one of them"
    for name in $SYSCTLS; do
        file=$(sysctl_file "$name")
        old=$(cat "$file")
        if [ "$old" = 1 ]; then
            say "sysctl net.bridge.$name: already 1"
        else
            echo 1 > "$file"
            note "sysctl $name $old"
            say "sysctl net.bridge.$name: $old -> 1"
        fi
    done
    say "note: bridged IP packets now pass the host's own ip and ip6 chains as well, and inconsistent ones are dropped there"
    forward_drops | while read -r chain; do
        say "note: the chain '$chain' drops what it does not accept, bridged packets as well; let them pass: $(forward_rule "$chain")"
    done
}

down() {
    need_root
    if ! [ -s "$RECORD" ]; then
        say "nothing to undo"
        return 0
    fi
    while read -r kind name rest; do
        case $kind in
            sysctl)
                file=$(sysctl_file "$name")
                if [ -e "$file" ]; then
                    echo "$rest" > "$file"
                    say "sysctl net.bridge.$name: back to $rest"
                fi
                ;;
            port)
                if [ "$(master_of "$name")" = "$rest" ]; then
                    ip link set dev "$name" nomaster
                    say "port $name: off $rest"
                fi
                ;;
            bridge)
                others=$(ip -o link show master "$name" 2> /dev/null || true)
                if [ -n "$others" ]; then
                    say "bridge $name: kept, it has other ports"
                elif is_bridge "$name"; then
                    ip link del dev "$name"
                    say "bridge $name: removed"
                fi
                ;;
            module)
                if modprobe -qr "$name" 2> /dev/null; then
                    say "module $name: unloaded"
                else
                    say "module $name: kept, it is in use"
                fi
                ;;
        esac
    done < "$RECORD"
    rm -f "$RECORD"
}

status() {
    need_root
    check_names
    missing=0
    lacks() {
        say "$1: MISSING - $2"
        missing=1
    }
    if is_bridge "$BRIDGE"; then
        say "bridge $BRIDGE: present, ports: $(ip -o link show master "$BRIDGE" | sed 's/^[0-9]*: \([^:@]*\).*/\1/' | paste -sd' ')"
    else
        lacks "bridge $BRIDGE" "'br-netfilter.sh up' creates it"
    fi
    for port in $PORTS; do
        [ "$(master_of "$port")" = "$BRIDGE" ] || lacks "port $port" "not on $BRIDGE; 'br-netfilter.sh up' puts it there"
    done
    path=$(queue_path)
    say "steering: $path"
    if [ "$path" = native ]; then
        has_native || lacks "nft queue expression" "load the module nft_queue, or use STEER=br-netfilter"
    else
        for name in $SYSCTLS; do
            value=$(cat "$(sysctl_file "$name")" 2> /dev/null || echo absent)
            if [ "$value" = 1 ]; then
                say "sysctl net.bridge.$name: 1"
            else
                lacks "sysctl net.bridge.$name" "it is $value; 'br-netfilter.sh up' sets it to 1"
            fi
        done
    fi
    while read -r chain; do
        [ -z "$chain" ] || lacks "a rule for bridged packets in '$chain'" "it drops what it does not accept: $(forward_rule "$chain")"
    done <<< "$(forward_drops)"
    if [ -n "$(ip -o addr show dev "$BRIDGE" scope global 2> /dev/null)" ]; then
        say "note: the host has an address on $BRIDGE: what it sends or routes to a middlebox is filtered, not balanced"
    fi
    if [ -s "$RECORD" ]; then
        say "'br-netfilter.sh down' would undo:"
        sed 's/^/    /' "$RECORD"
    fi
    return "$missing"
}

# ---------------------------------------------------------------------------------------------------------------- demo

VM_MAC=12:13:14:15:16:17
CLIENT_MAC=02:00:00:00:00:01

in_ns() {
    local namespace=$1
    shift
    ip netns exec "$lab-$namespace" "$@"
}

# Starts a program in a namespace, with its errors in a file. Not by in_ns: $! must be the program's own process id, not
# that of a subshell, which would end without it.
start() {
    local namespace=$1 errors=$2
    shift 2
    ip netns exec "$lab-$namespace" "$@" 2> "$errors" &
    pids="$pids $!"
}

demo_clean() {
    trap - EXIT INT TERM
    for pid in $pids; do
        kill "$pid" 2> /dev/null || true
    done
    # shellcheck disable=SC2086
    wait $pids 2> /dev/null || true
    for namespace in client other vm backend second host; do
        ip netns del "$lab-$namespace" 2> /dev/null || true
    done
    rm -rf "$work"
}

demo_install() {
    packages=""
    for pair in cc:gcc pkg-config:pkg-config nft:nftables ip:iproute2 ping:iputils-ping socat:socat; do
        command -v "${pair%%:*}" > /dev/null || packages="$packages ${pair##*:}"
    done
    if [ -n "$source" ]; then
        for library in libnftnl:libnftnl-dev libmnl:libmnl-dev; do
            pkg-config --exists "${library%%:*}" 2> /dev/null || packages="$packages ${library##*:}"
        done
    fi
    [ -n "$packages" ] || return 0
    command -v apt-get > /dev/null || die 3 "missing:$packages; install them (the demo can do so on Debian only)"
    say "installing:$packages"
    # shellcheck disable=SC2086
    { apt-get update -q && apt-get install -q -y --no-install-recommends $packages; } > "$work/apt" 2>&1 || {
        tail -n 5 "$work/apt" >&2
        die 3 "apt-get could not install:$packages"
    }
}

# nfqd and nfqd-guest: built from the source beside this script, or the installed ones.
demo_programs() {
    if [ -z "$source" ]; then
        nfqd=$(command -v nfqd || true)
        guest=$(command -v nfqd-guest || true)
        [ -n "$nfqd" ] && [ -n "$guest" ] && return 0
        die 1 "the demo needs the source tree beside this script, or nfqd and nfqd-guest installed"
    fi
    PATH=$PATH:${SUDO_USER:+$(getent passwd "$SUDO_USER" | cut -d: -f6)/.cargo/bin:}/root/.cargo/bin
    command -v cargo > /dev/null || die 3 "needs Rust's cargo; install it from https://rustup.rs"
    say "building (a few minutes the first time)"
    cargo build --quiet --release --manifest-path "$source/Cargo.toml" -p nfqd -p nfqd-guest || die 1 "the build failed"
    target=${CARGO_TARGET_DIR:-$source/target}
    nfqd=$target/release/nfqd
    guest=$target/release/nfqd-guest
}

demo_lab() {
    for namespace in host client other vm backend second; do
        ip netns add "$lab-$namespace"
        in_ns "$namespace" ip link set lo up
    done
    attach() {
        in_ns host ip link add "$1" type veth peer name eth0 address "$2" netns "$lab-$1"
        in_ns "$1" ip addr add "$3/24" dev eth0
        in_ns "$1" ip link set eth0 up
    }
    attach client "$CLIENT_MAC" 10.129.126.1
    attach other 02:00:00:00:00:02 10.129.126.2
    attach vm "$VM_MAC" 10.129.126.15
    attach backend 02:00:00:00:00:17 10.129.126.17
    attach second 02:00:00:00:00:18 10.129.126.18
    say "a lab of network namespaces; in its host: br-netfilter.sh up"
    in_ns host env BRIDGE=kvmbr0 PORTS="client other vm backend second" RECORD="$work/record" "$self" up | sed 's/^/    /'
    for namespace in vm backend second; do
        start "$namespace" "$work/$namespace" socat TCP-LISTEN:80,fork,reuseaddr "SYSTEM:echo $namespace"
    done
    start backend "$work/sink" socat -u TCP-LISTEN:81,fork,reuseaddr CREATE:/dev/null
    start host "$work/log" "$nfqd" --queue 0-3 --shm "$work/shm,mac=$VM_MAC" --state "$work/state" \
        --control "$work/control"
    for _ in $(seq 100); do
        in_ns host "$nfqd" status --control "$work/control" > /dev/null 2>&1 && return 0
        kill -0 "${pids##* }" 2> /dev/null || break
        sleep 0.1
    done
    cat "$work/log" >&2
    die 3 "nfqd does not start; its log is above"
}

# Prints which host answers another at the middlebox' address; - if none does.
who() {
    answer=$(in_ns "$1" socat -T 1 - TCP:10.129.126.15:80,connect-timeout=1 2> /dev/null < /dev/null || true)
    echo "${answer:--}"
}

# Prints which host answers the client, and which the other host.
both() {
    printf '%-8s %s' "$(who client)" "$(who other)"
}

# Prints which hosts answer six connections of the client, and how many of them.
six() {
    for _ in 1 2 3 4 5 6; do who client; done | sort | uniq -c | awk '{ printf "%s%s %s", comma, $1, $2; comma = ", " }'
}

# One line of the table: the VM writes the command, and then $2 must print $3.
step() {
    command=$1
    if [ -n "$command" ]; then
        reply=$("$guest" --shm "$work/shm" -w "@$command@" 2>&1) || true
    else
        reply="-"
    fi
    # A backend's MAC is found within a second; a slow machine takes longer.
    for _ in $(seq 12); do
        found=$("$2")
        [ "$found" != "$3" ] || break
        sleep 0.3
    done
    if [ "$found" = "$3" ] && [[ $reply = OK* || $reply = - ]]; then
        result=yes
    else
        result=NO
        failed=1
    fi
    row "${command:-(nothing)}" "$found" "$result"
    [[ $reply = OK* || $reply = - ]] || say "    $reply"
}

row() {
    printf '%-72s %-20s %s\n' "$@"
}

engine_packets() {
    in_ns host "$nfqd" status --json --control "$work/control" \
        | awk -F'[:,]' '/"middleboxes"/ { past = 1 } !past && /"packets"/ { sum += $2 } END { print sum + 0 }'
}

demo() {
    need_root
    self=$(readlink -f "$0")
    source=$(dirname "$self")
    [ -e "$source/nfqd/Cargo.toml" ] || source=""
    work=$(mktemp -d -t nfqd-demo.XXXXXX)
    lab=nfqd-demo-$$
    pids=""
    failed=0
    trap demo_clean EXIT
    trap 'exit 130' INT TERM
    demo_install
    demo_programs
    demo_lab
    say ""
    say "the server that answers at the middlebox' address 10.129.126.15, after each command of its VM:"
    say ""
    row command "client   other" "expected"
    step "" both "vm       vm"
    step "R L $VM_MAC 10.129.126.15 0 10.129.126.17" both "backend  backend"
    step "R F $VM_MAC 10.129.126.15" both "backend  backend"
    step "A $VM_MAC M 5 s 1:2:3:4:5:6 p 8" both "backend  backend"
    step "A $VM_MAC M 5 s $CLIENT_MAC p 8" both "-        backend"
    step "D $VM_MAC M 4 s" both "-        -"
    step "X $VM_MAC F" both "backend  backend"
    before=$(engine_packets)
    head -c 268435456 /dev/zero | in_ns client socat -u - TCP:10.129.126.15:81,connect-timeout=2 || failed=1
    packets=$(($(engine_packets) - before))
    [ "$packets" -lt 100 ] || failed=1
    row "(256 MiB to the backend by TCP)" "$packets packets" "went to the engine"
    step "R L $VM_MAC 10.129.126.15:80 rr 10.129.126.17 10.129.126.18" six "3 backend, 3 second"
    step "B $VM_MAC 10.129.126.15:80 = 10.129.126.17 drain" six "6 second"
    say ""
    in_ns host nft list table bridge nfqd
    say ""
    step "X $VM_MAC" both "vm       vm"
    if [ "$failed" != 0 ]; then
        cat "$work/log" >&2
        die 1 "a result is not as expected"
    fi
    say "every result is as expected"
}

case ${1:-up} in
    up | down | status | demo)
        [ $# -le 1 ] || die 2 "usage: br-netfilter.sh [up|down|status|demo]"
        "${1:-up}"
        ;;
    -h | --help) sed -n '2,13s/^# \{0,1\}//p' "$0" ;;
    *) die 2 "usage: br-netfilter.sh [up|down|status|demo]" ;;
esac
