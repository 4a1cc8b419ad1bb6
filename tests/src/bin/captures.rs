//! Writes the corpus of captures into `tests/captures`.

use nfqd_tests::captures::{all, folder, pcap};

fn main() -> std::io::Result<()> {
    for (name, frames) in all() {
        std::fs::write(folder().join(format!("{name}.pcap")), pcap(&frames))?;
        println!("{name}.pcap: {} frames", frames.len());
    }
    Ok(())
}
