//! Processes that train together in a test: each is a thread with a membership of its own.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used)] // each test file uses a part; a helper that fails is a failed test

use lora_torch::distributed::{Gloo, Launch};
use lora_train::{Error, NoEvents, Override, RunConfig, RunPlan, Team};
use std::net::TcpListener;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// Runs `body` in each of so many processes, and returns what each came to, in the order of ranks.
pub fn together<T: Send>(world: u32, body: impl Fn(Team) -> T + Sync) -> Vec<T> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let body = &body;
    let member = move |rank| {
        let launch =
            Launch { rank, world, local_rank: rank, address: "127.0.0.1".into(), port, hosts: true, attempt: 0 };
        let team = Team::of(Gloo::connect(&launch, Duration::from_secs(120)).unwrap());
        let result = body(team.clone());
        // Rank 0 has the store: all leave together, whatever each came to.
        let _ = team.agree(Ok(()));
        result
    };
    thread::scope(|scope| {
        let running: Vec<_> = (0..world).map(|rank| scope.spawn(move || member(rank))).collect();
        running.into_iter().map(|one| one.join().unwrap()).collect()
    })
}

/// Rows of so many words, each with an answer of some.
pub fn write_rows(dir: &Path, lengths: &[(usize, usize)]) {
    let words =
        |n: usize, i: usize| (0..n).map(|k| ["the", "weight", "is", "a"][(i + k) % 4]).collect::<Vec<_>>().join(" ");
    let row = |(i, (prompt, answer)): (usize, &(usize, usize))| {
        format!("{{\"prompt\": \"{}: \", \"completion\": \"{}\"}}\n", words(*prompt, i), words(*answer, i + 1))
    };
    std::fs::write(dir.join("train.jsonl"), lengths.iter().enumerate().map(row).collect::<String>()).unwrap();
}

/// A run of six steps of the small llama over the rows in `dir`, with `more` set.
pub fn plan(dir: &Path, more: &[&str]) -> RunPlan {
    RunPlan::resolve(config(dir, more).unwrap(), &mut NoEvents).unwrap()
}

/// Its configuration.
pub fn config(dir: &Path, more: &[&str]) -> Result<RunConfig, Error> {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama");
    let mut set = vec![
        format!("output_dir={}", dir.join("run").display()),
        format!("model.path={}", base.display()),
        "model.device=cpu".into(),
        "model.threads=1".into(),
        format!("data.train={}", dir.join("train.jsonl").display()),
        "data.cache=never".into(),
        "train.max_steps=6".into(),
        "train.per_device_train_batch_size=2".into(),
        "train.gradient_accumulation_steps=4".into(),
        "train.learning_rate=1e-3".into(),
        "train.max_grad_norm=0".into(),
        "train.sample_count=0".into(),
    ];
    set.extend(more.iter().map(|s| (*s).to_string()));
    let overrides: Vec<Override> = set.iter().map(|s| s.parse().unwrap()).collect();
    Ok(RunConfig::load(None, &overrides)?)
}
