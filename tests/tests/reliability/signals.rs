//! R10, R11: asked to stop, and told to.

use crate::lab::{Lab, Random, contents, signal, wait_for};
use crate::report::{Row, extent};
use e2e::{Done, fixtures};
use std::time::{Duration, Instant};

#[test]
fn r10_asked_to_stop_at_a_random_time() {
    let row = Row::new("R10");
    let (lab, times) = (Lab::new(), extent(6, 50));
    let (mut random, mut stopped, mut slowest) = (Random(10), 0, Duration::ZERO);
    for i in 0..times {
        let (run, which) = (format!("run-{i}"), if i % 2 == 0 { "INT" } else { "TERM" });
        let child = lab.start(&run, &["--json"]);
        // The first line is that of the evaluation before the first step, behind which there is nothing to be saved.
        lab.wait_for_lines(&run, 2 + random.below(11) as usize);
        std::thread::sleep(Duration::from_micros(random.below(20_000)));
        let sent = Instant::now();
        signal(which, child.id());
        let done = Done::of(child.wait_with_output().unwrap()).exits(0);
        slowest = slowest.max(sent.elapsed());
        let report: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
        lab.all_whole(&run, which);
        let steps = report["steps"].as_u64().unwrap();
        assert_eq!(lab.checkpoints(&run).last(), Some(&steps), "the step was finished and saved");
        if report["status"] == "stopped" {
            stopped += 1;
            assert!(!lab.path(&run).join("adapter_model.safetensors").exists());
            // Where it stopped is one more checkpoint; which of them are kept is no part of the result.
            lab.ends_as_if_nothing_had_happened(&run, which);
        } else {
            // Behind its last step: of all that is still to come only the answers to samples may be cut short.
            lab.has_the_adapter(&run, which);
        }
    }
    assert!(stopped * 2 > times, "only {stopped} of {times} stopped in the middle");
    row.held(&format!(
        "{stopped} of {times} stopped in the middle, saved and exited 0, at most {:.1} s after the signal (others ended first); 0 differences",
        slowest.as_secs_f64()
    ));
}

#[test]
fn r11_told_to_leave_at_once() {
    let row = Row::new("R11");
    // Two steps an epoch, of so many micro-batches that the signals come in the middle of one.
    let rows: String = (0..1200)
        .map(|i| format!("{{\"prompt\": \"adds {i}: \", \"completion\": \"the weight {}\"}}\n", i % 7))
        .collect();
    let train = "gradient_accumulation_steps = 300\nlearning_rate = 2e-2\nmax_steps = 2\nsave_steps = 1";
    let mut lab = Lab::bare(&fixtures().join("llama"), &rows, "", train);
    lab.run_whole();
    let times = extent(1, 10);
    for i in 0..times {
        let run = format!("run-{i}");
        let child = lab.start(&run, &[]);
        wait_for(|| lab.checkpoints(&run) == [1]);
        std::thread::sleep(Duration::from_millis(20));
        let older = contents(&lab.checkpoint(&run, 1));
        signal("INT", child.id());
        std::thread::sleep(Duration::from_millis(50));
        signal("INT", child.id());
        Done::of(child.wait_with_output().unwrap()).exits(130).says(&["press Ctrl-C again to leave at once"]);
        assert_eq!(lab.checkpoints(&run), [1], "the step was not finished");
        assert!(contents(&lab.checkpoint(&run, 1)) == older);
        lab.ends_as_if_nothing_had_happened(&run, "left at once");
    }
    row.held(&format!(
        "{times} of {times} left in the middle of a step with exit code 130; the older checkpoint good; 0 differences"
    ));
}
