//! What must survive: kills at any moment and at every call of the system, failing and full disks, damaged checkpoints,
//! signals, two runs at once, numbers that are not finite, too little memory. Every test drives the program and is named
//! after its row of `docs/reliability.md`.
//!
//! `cargo test` runs a quick form of each; `cargo xtask faults --long` the whole, and writes the page's figures.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)] // a test that cannot go on has failed
#![allow(unreachable_pub)] // its modules are for each other

mod damage;
mod folders;
mod hosts;
mod inject;
mod injected;
mod input;
mod kills;
mod lab;
mod memory;
mod numbers;
mod ranks;
mod report;
mod resume;
mod signals;
mod stages;
