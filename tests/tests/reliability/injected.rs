//! R2 to R5, R12: faults at the calls of a run that goes on, saves, removes an older checkpoint and writes its results.

use crate::inject::{Call, NAMES, NEEDS_STRACE, SYNCS, WRITES, calls, sample, strace, traced, with_fault};
use crate::lab::{LORA, Lab, SAVE, STEPS, contents, names, signal, wait_for};
use crate::report::{Row, extent, long};
use e2e::Done;
use std::collections::BTreeMap;
use std::process::{Command, Stdio};

/// With the third checkpoint the first one goes.
const RESUME: &[&str] = &["--resume", "--set", "train.save_total_limit=2"];
const LIMIT: &[&str] = &["--set", "train.save_total_limit=2"];

fn all() -> Vec<&'static str> {
    [WRITES, SYNCS, NAMES].concat()
}

/// The calls of a run that goes on from an interrupted one.
fn calls_of(lab: &Lab, names: &[&str]) -> Vec<Call> {
    lab.interrupted("run");
    calls(lab, "run", RESUME, names)
}

#[test]
fn r02_kill_at_every_call() {
    let row = Row::new("R2");
    let Some(_) = strace() else { return row.not_run(NEEDS_STRACE) };
    let lab = Lab { after: LIMIT, ..Lab::new() };
    let every = calls_of(&lab, &all());
    let (count, tried) = (every.len(), sample(every, extent(10, usize::MAX / 2)));
    let mut killed = 0;
    for call in &tried {
        let what = format!("killed at {} {}: {}", call.name, call.nth, call.text);
        lab.interrupted("run");
        let older = contents(&lab.checkpoint("run", 2 * SAVE));
        let done = with_fault(&lab, "run", call, "signal=KILL", RESUME);
        assert!(matches!(done.code, None | Some(0)), "{what}: {done:#?}");
        killed += usize::from(done.code.is_none());
        lab.all_whole("run", &what);
        let newest = lab.checkpoints("run").last().copied();
        assert!([Some(2 * SAVE), Some(STEPS)].contains(&newest), "{what}: {newest:?}");
        assert!(contents(&lab.checkpoint("run", 2 * SAVE)) == older, "{what}: the older checkpoint changed");
        lab.ends_as_if_nothing_had_happened("run", &what);
    }
    assert!(killed * 10 >= tried.len() * 9, "only {killed} of {} died", tried.len());
    row.held(&format!("{killed} kills at {} of {count} calls; 0 mixes, 0 differences", tried.len()));
}

/// What must hold after an error of the system: the run says which and where, and nothing older suffered.
fn failed_well(lab: &Lab, done: &Done, call: &Call, words: &str) -> bool {
    let what = format!("{words} at {} {}: {}", call.name, call.nth, call.text);
    lab.all_whole("run", &what);
    assert!(!done.stderr.contains("panicked"), "{what}: {done:#?}");
    match done.code {
        // What was only to be tidied up, or a hint to the system.
        Some(0) => lab.is_whole("run", &what),
        Some(1 | 2) => {
            let message: Vec<&str> = done.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
            let [message] = message.as_slice() else { panic!("{what}: not one message: {done:#?}") };
            let place = lab.path("run").display().to_string();
            assert!(message.contains(words) && message.contains(&place), "{what}: {message}");
            let under_way = message.contains("stopped at step");
            assert!(!under_way || message.contains("--resume"), "{what}: {message}");
        }
        _ => panic!("{what}: {done:#?}"),
    }
    let newest = lab.checkpoints("run").last().copied();
    assert!([Some(2 * SAVE), Some(STEPS)].contains(&newest), "{what}: {newest:?}");
    lab.ends_as_if_nothing_had_happened("run", &what);
    done.code != Some(0)
}

/// One error at each of these calls; returns how often the run ended by it.
fn errors(lab: &Lab, tried: &[Call], error: &str, words: &str) -> usize {
    let mut ended = 0;
    for call in tried {
        lab.interrupted("run");
        let older = contents(&lab.checkpoint("run", 2 * SAVE));
        let done = with_fault(lab, "run", call, &format!("error={error}"), RESUME);
        assert!(contents(&lab.checkpoint("run", 2 * SAVE)) == older, "{call:?}: the older checkpoint changed");
        ended += usize::from(failed_well(lab, &done, call, words));
    }
    ended
}

#[test]
fn r03_a_failing_disk_at_every_call() {
    let row = Row::new("R3");
    let Some(_) = strace() else { return row.not_run(NEEDS_STRACE) };
    let lab = Lab { after: LIMIT, ..Lab::new() };
    let every = calls_of(&lab, &all());
    let (count, tried) = (every.len(), sample(every, extent(10, usize::MAX / 2)));
    let ended = errors(&lab, &tried, "EIO", "Input/output error");
    assert!(ended > tried.len() / 2, "{ended}");
    row.held(&format!(
        "EIO at {} of {count} calls: {ended} runs ended with one message, {} went on rightly; 0 differences",
        tried.len(),
        tried.len() - ended
    ));
}

#[test]
fn r04_a_full_disk_at_every_write() {
    let row = Row::new("R4");
    let Some(_) = strace() else { return row.not_run(NEEDS_STRACE) };
    let lab = Lab { after: LIMIT, ..Lab::new() };
    let every: Vec<Call> = calls_of(&lab, &["write", "openat", "mkdir"])
        .into_iter()
        .filter(|call| call.name != "openat" || call.text.contains("O_CREAT"))
        .collect();
    let (count, tried) = (every.len(), sample(every, extent(8, usize::MAX / 2)));
    let ended = errors(&lab, &tried, "ENOSPC", "No space left on device");
    assert!(ended > tried.len() / 2, "{ended}");
    let Some(told) = small_disk(&lab) else {
        return row.held(&format!(
            "ENOSPC at {} of {count} calls; no small disk: `unshare -rm` cannot mount here",
            tried.len()
        ));
    };
    row.held(&format!(
        "ENOSPC at {} of {count} calls: {ended} runs ended with one message; on a disk of 3.3 checkpoints {told}; 0 differences",
        tried.len()
    ));
}

/// A file system of its own with room for three checkpoints and a third, and for what a run tells of itself. The one that does not fit must leave nothing, be it
/// that it was not begun or that it ended on the way. `None` where this system lets nobody mount one.
fn small_disk(lab: &Lab) -> Option<&'static str> {
    let room = |files: &BTreeMap<String, Vec<u8>>| -> usize {
        files.values().map(|file| file.len().next_multiple_of(4096)).sum()
    };
    let size = room(&contents(&lab.checkpoint("whole", STEPS)));
    // What a run tells of itself.
    let mut told = contents(&lab.path("whole"));
    told.retain(|name, _| !name.starts_with("adapter") && !name.starts_with("tokenizer"));
    let disk = lab.path("disk");
    std::fs::create_dir_all(&disk).unwrap();
    let script = format!(
        "mount -t tmpfs -o size={} none \"$1\" || exit 99; disk=$1; copied=$2; shift 2; \
         \"$@\"; code=$?; cp -a \"$disk/run\" \"$copied\"; exit $code",
        size * 33 / 10 + room(&told)
    );
    let started = Command::new("unshare")
        .args(["-rm", "sh", "-c", &script, "sh"])
        .args([&disk, &lab.path("copied")])
        .arg(LORA)
        .args(lab.args("disk/run", &["--set", "train.save_total_limit=9", "--set", "train.save_steps=3"]))
        .stdin(Stdio::null())
        .output();
    let done = started.ok().map(Done::of).filter(|done| done.code != Some(99) && !done.stderr.contains("unshare:"))?;
    let done = done.exits(1).says(&["stopped at step", "is whole", "--resume"]);
    // Either there was no room to begin with, or it ended on the way.
    let words = ["a checkpoint needs", "No space left on device"];
    assert!(words.iter().any(|words| done.stderr.contains(words)), "{done:#?}");
    assert!(!done.stderr.contains("panicked"));
    let kept = lab.checkpoints("copied");
    assert!(!kept.is_empty() && kept.iter().zip((3..).step_by(3)).all(|(step, wanted)| *step == wanted), "{done:#?}");
    lab.all_whole("copied", "a small disk");
    assert!(names(&lab.path("copied/checkpoints")).iter().all(|name| name.starts_with("step-")));
    // With room again the run goes on; its folder is another one, which is no change of the run.
    let resumed =
        lab.train("copied", &["--resume", "--set", "train.save_total_limit=3", "--set", "train.save_steps=5"]);
    resumed.exits(0);
    lab.is_whole("copied", "room again");
    Some("nothing half written was left, and with room again the run went on")
}

#[test]
fn r05_a_full_disk_for_the_metrics_alone() {
    let row = Row::new("R5");
    let Some(_) = strace() else { return row.not_run(NEEDS_STRACE) };
    let lab = Lab { after: LIMIT, ..Lab::new() };
    let mut every = calls_of(&lab, &["write"]);
    every.retain(|call| call.text.contains("metrics.jsonl"));
    assert_eq!(every.len() as u64, STEPS - 2 * SAVE + 2, "a line each step, of the evaluation and the end");
    let (count, tried) = (every.len(), sample(every, extent(2, usize::MAX / 2)));
    let ended = errors(&lab, &tried, "ENOSPC", "metrics.jsonl: No space left on device");
    assert_eq!(ended, tried.len());
    row.held(&format!(
        "{} of {count} lines: each time one message, the checkpoint untouched, 0 differences",
        tried.len()
    ));
}

#[test]
fn r12_sigterm_during_a_checkpoint() {
    let row = Row::new("R12");
    let Some(_) = strace() else { return row.not_run(NEEDS_STRACE) };
    let lab = Lab::new();
    let syncs = calls_of(&lab, &["fsync", "fdatasync", "rename"]);
    let syncs: Vec<&Call> =
        syncs.iter().filter(|call| call.name == "fsync" && call.text.contains("checkpoints")).collect();
    let tried: Vec<&&Call> = if long() { syncs.iter().collect() } else { syncs.iter().step_by(5).collect() };
    let mut stopped = 0;
    for call in &tried {
        lab.interrupted("run");
        // This one takes half a second, in which the signal comes.
        let inject = format!("inject=fsync:delay_exit=500000:when={}", call.nth);
        let args = ["-o", "/dev/null", "-e", "trace=fsync", "-e", &inject];
        let mut command = traced(&lab, "run", &args, &["--resume", "--json"]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let checkpoints = lab.path("run/checkpoints");
        wait_for(|| names(&checkpoints).iter().any(|name| name.starts_with(".tmp-step-15") || name == "step-15"));
        if let Some(pid) = lab.holder("run") {
            signal("TERM", pid);
        }
        let done = Done::of(child.wait_with_output().unwrap()).exits(0);
        stopped += usize::from(done.stderr.contains("finishing the step, saving"));
        assert_eq!(lab.checkpoints("run"), [SAVE, 2 * SAVE, STEPS], "{done:#?}");
        lab.all_whole("run", "SIGTERM during a checkpoint");
        lab.ends_as_if_nothing_had_happened("run", "SIGTERM during a checkpoint");
    }
    assert!(stopped > 0, "no signal arrived");
    row.held(&format!(
        "{} of {} fsyncs of a save held up, {stopped} signals came; each save completed",
        tried.len(),
        syncs.len()
    ));
}
