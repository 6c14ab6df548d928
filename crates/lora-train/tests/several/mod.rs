//! Processes that train together in a test: each is a thread with a membership of its own.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used)] // each test file uses a part; a helper that fails is a failed test

use lora_torch::distributed::{Gloo, Launch};
use lora_train::{Error, Event, NoEvents, Override, RunConfig, RunPlan, Team, TrainOptions, train};
use std::net::TcpListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
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

/// Twelve rows of many lengths.
pub const ROWS: [(usize, usize); 12] =
    [(3, 2), (9, 1), (1, 7), (4, 4), (2, 2), (8, 8), (5, 1), (1, 1), (6, 3), (2, 5), (7, 7), (3, 3)];

/// Trains as two into `run` of `dir`, until rank 1 is asked to stop when rank 0 has come to its third step; the step behind which
/// both stopped, with one checkpoint of it.
pub fn stopped_by_rank_1(dir: &Path, more: &[&str]) -> u64 {
    let request = AtomicBool::new(false);
    let reports = together(2, |team| {
        let never = AtomicBool::new(false);
        let stop = if team.rank() == 1 { &request } else { &never };
        let mut sink = |event: Event| {
            if let Event::Step(record) = event {
                request.fetch_or(record.step == 3, Ordering::Relaxed);
            }
        };
        let options = TrainOptions { team, ..TrainOptions::default() };
        train(plan(dir, more), &options, stop, &mut sink).unwrap().0
    });
    let steps = reports[0].steps;
    assert!(reports.iter().all(|report| report.status == "stopped" && report.steps == steps), "{reports:?}");
    assert!((4..8).contains(&steps), "{steps}");
    assert!(dir.join(format!("run/checkpoints/step-{steps}/manifest.json")).is_file());
    steps
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
