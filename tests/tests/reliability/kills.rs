//! R1, R14, N5: killed at a random moment.

use crate::lab::{Lab, Random};
use crate::report::{Row, extent};
use e2e::Done;
use std::time::Duration;

/// Kills runs at random moments until `kills` have hit a living one, several in each run; returns the runs that came to
/// their end in spite of them.
fn kill(lab: &Lab, kills: u32, random: &mut Random) -> (u32, u32) {
    let (mut hit, mut ended, mut training) = (0, 0, 0);
    while hit < kills {
        let run = format!("run-{ended}");
        let mut child = lab.go_on(&run);
        // As long as the whole run takes: some of them come to their end.
        std::thread::sleep(Duration::from_micros(random.below((lab.seconds * 1e6) as u64)));
        child.kill().unwrap();
        let done = Done::of(child.wait_with_output().unwrap());
        lab.all_whole(&run, "after a kill");
        if done.code.is_none() {
            hit += 1;
            training += u32::from(lab.path(&run).join("metrics.jsonl").exists());
            continue;
        }
        assert_eq!(done.code, Some(0), "{done:#?}");
        lab.is_whole(&run, "a run with kills");
        ended += 1;
    }
    lab.ends_as_if_nothing_had_happened(&format!("run-{ended}"), "the last run with kills");
    (ended + 1, training)
}

#[test]
fn r01_kill_at_a_random_time() {
    let row = Row::new("R1");
    let (lab, kills) = (Lab::new(), extent(12, 200));
    let (runs, training) = kill(&lab, kills, &mut Random(1));
    row.held(&format!("{kills} kills over {runs} runs, {training} of them after the first step; 0 differences"));
}

#[test]
fn r14_a_stale_lock_after_a_kill() {
    let row = Row::new("R14");
    let (lab, times) = (Lab::new(), extent(3, 20));
    for i in 0..times {
        let run = format!("run-{i}");
        let mut child = lab.start(&run, &[]);
        lab.wait_for_lines(&run, 2 + i % 7);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(lab.holder(&run).is_some() || lab.path(&run).join("adapter_model.safetensors").exists());
        lab.ends_as_if_nothing_had_happened(&run, "after a stale lock");
    }
    row.held(&format!("{times} of {times} started again with nothing done by hand"));
}
