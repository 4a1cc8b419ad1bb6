//! The fuzz targets over their corpus. `fuzz/run TARGET SECONDS` extends it.
#![allow(clippy::unwrap_used)]

use std::path::Path;

fn over_the_corpus(target: &str, least: usize, each: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut inputs = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let data = std::fs::read(&path).unwrap();
        // So that a failure names its input.
        println!("{}", path.display());
        each(&data);
        inputs += 1;
    }
    assert!(inputs >= least, "{}: {inputs} inputs", folder.display());
}

#[test]
fn commands() {
    over_the_corpus("command", 20, nfqd_tests::fuzz::command);
}

#[test]
fn packets() {
    over_the_corpus("packet", 20, nfqd_tests::fuzz::packet);
}

#[test]
fn rings() {
    over_the_corpus("ring", 8, nfqd_tests::fuzz::ring);
}
