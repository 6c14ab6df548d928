//! D9 and D10: a model that is divided among processes, one of which is killed or stopped; and what is left, and who goes on with it.

use crate::lab::{Lab, Random, signal};
use crate::ranks::{LEAVES, done, launch, ranks};
use crate::report::{Row, extent};
use e2e::{Done, fixtures, small_dataset};
use std::time::{Duration, Instant};

/// A run of two stages, with dropout, evaluations and checkpoints, and its whole course.
fn lab() -> Lab {
    let train = "gradient_accumulation_steps = 4\nlearning_rate = 2e-2\nwarmup_steps = 3\nmax_steps = 15\nsave_steps = 5\n\
                 save_total_limit = 3\npipeline_stages = 2";
    let mut lab = Lab::bare(&fixtures().join("llama"), &small_dataset(), "eval_split = 2", train);
    Done::of(launch(&lab, "whole", 2, &[]).output().unwrap()).exits(0);
    lab.whole = lab.outcome("whole");
    lab
}

#[track_caller]
fn goes_on_as_if_nothing_had_happened(lab: &Lab, output: &str, what: &str) {
    let more: &[&str] = if lab.checkpoints(output).is_empty() { &[] } else { &["--resume"] };
    Done::of(launch(lab, output, 2, more).output().unwrap()).exits(0);
    lab.is_whole(output, what);
}

#[test]
fn d09_a_killed_stage() {
    let row = Row::new("D9");
    let (lab, times) = (lab(), extent(4, 50));
    let (mut random, mut slowest) = (Random(9), Duration::ZERO);
    for i in 0..times {
        let (run, victim) = (format!("run-{i}"), i % 2);
        let mut both = ranks(&lab, &run, 2, &[]);
        lab.wait_for_lines(&run, 1 + random.below(6) as usize);
        std::thread::sleep(Duration::from_micros(random.below(20_000)));
        signal("KILL", both[victim].id());
        let killed = Instant::now();
        let left = done(both.remove(1 - victim)).exits(1).says(&[&format!("rank {victim} lost")]);
        slowest = slowest.max(killed.elapsed());
        assert!(killed.elapsed() < LEAVES, "{:?}: {}", killed.elapsed(), left.stderr);
        done(both.remove(0));
        lab.all_whole(&run, "killed");
        goes_on_as_if_nothing_had_happened(&lab, &run, "a stage was killed");
    }
    let mut both = ranks(&lab, "stopped", 2, &["--set", "train.max_steps=5000", "--set", "train.ddp_timeout=3"]);
    lab.wait_for_lines("stopped", 2);
    signal("STOP", both[1].id());
    let start = Instant::now();
    done(both.remove(0)).exits(1).says(&["rank 1 lost"]);
    let stopped = start.elapsed();
    assert!(stopped < Duration::from_secs(3) + LEAVES, "{stopped:?}");
    signal("KILL", both[0].id());
    done(both.remove(0));
    row.held(&format!(
        "{times} kills in turn of the first and the second stage: the other left at most {:.1} s later and named it; 0 differences \
         after going on; a stopped stage with train.ddp_timeout = 3: the other left after {:.1} s",
        slowest.as_secs_f64(),
        stopped.as_secs_f64()
    ));
}

#[test]
fn d10_stages_leave_what_one_process_leaves() {
    let row = Row::new("D10");
    let lab = lab();
    let one = ["--set", "train.pipeline_stages=1"];
    lab.train("alone", &one).exits(0);
    // Clipping divides by a norm that is summed in another order.
    let unclipped = ["--set", "train.max_grad_norm=0"];
    Done::of(launch(&lab, "stages", 2, &unclipped).output().unwrap()).exits(0);
    lab.train("process", &[one, unclipped].concat()).exits(0);
    let adapter = |run: &str| std::fs::read(lab.path(run).join("adapter_model.safetensors")).unwrap();
    assert!(adapter("stages") == adapter("process"), "unclipped, the adapters have the same bits");

    // One process goes on from two stages, and two stages from one process.
    let six = ["--set", "train.max_steps=6"];
    let on = ["--resume", "--set", "train.max_steps=15"];
    Done::of(launch(&lab, "to-one", 2, &six).output().unwrap()).exits(0);
    lab.train("to-one", &[on.as_slice(), &one].concat()).exits(0).says(&["train.pipeline_stages was 2 and is nothing"]);
    lab.train("to-two", &[six, one].concat()).exits(0);
    let two = ["--set", "train.pipeline_stages=2"];
    Done::of(launch(&lab, "to-two", 2, &[on.as_slice(), &two].concat()).output().unwrap()).exits(0);
    assert!(adapter("to-one").len() == adapter("whole").len() && adapter("to-two").len() == adapter("whole").len());

    // Data and blocks are not divided at once, and one process is not two stages.
    let four = Done::of(launch(&lab, "four", 4, &[]).output().unwrap()).exits(2);
    four.says(&["train.pipeline_stages = 2 for 4 ranks", "lora launch -n 2"]);
    lab.train("lonely", &[]).exits(2).says(&["train.pipeline_stages = 2 for 1 process", "lora launch -n 2"]);
    let grpo = ["--set", "objective.name=\"dpo\""];
    Done::of(launch(&lab, "dpo", 2, &grpo).output().unwrap()).exits(2).says(&["objective.name", "\"sft\""]);
    for refused in ["four", "lonely", "dpo"] {
        assert!(!lab.path(refused).exists(), "{refused}: nothing was begun");
    }
    row.held("2 stages against a process: the same bits without clipping; one process resumed two stages, and two stages one process");
}
