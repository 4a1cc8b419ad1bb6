//! A server for many connections, in the network namespace that it is started in: `load NAME PORT`,
//! both numbers.
#![allow(clippy::expect_used)]

fn main() {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse().expect("a number"));
    let (name, port): (u16, u16) =
        (arguments.next().expect("a name"), arguments.next().expect("a port"));
    nfqd_tests::load::run(name.try_into().expect("a byte"), port);
}
