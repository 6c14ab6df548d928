//! R13, R15: two runs in one folder, and folders that no run can work in.

use crate::lab::{LORA, Lab, signal, wait_for};
use crate::report::{Row, extent};
use e2e::{Done, fixtures};
use std::process::{Command, Stdio};

#[test]
fn r13_two_runs_in_one_folder() {
    let row = Row::new("R13");
    let times = extent(5, 50);
    // Far more steps than the test waits for.
    let rows: String =
        (0..64).map(|i| format!("{{\"prompt\": \"adds {i}: \", \"completion\": \"the weight\"}}\n")).collect();
    let train = "learning_rate = 1e-4\nmax_steps = 100000\nsave_steps = 0";
    let lab = Lab::bare(&fixtures().join("llama"), &rows, "", train);
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    for i in 0..times {
        let run = format!("run-{i}");
        // In every second round the folder is there already.
        if i % 2 == 1 {
            std::fs::create_dir(lab.path(&run)).unwrap();
        }
        let mut children = [lab.start(&run, &[]), lab.start(&run, &[])];
        let mut ended = None;
        while ended.is_none() {
            ended = children.iter_mut().position(|child| child.try_wait().unwrap().is_some());
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let [first, second] = children;
        let (loser, mut winner) = if ended == Some(0) { (first, second) } else { (second, first) };
        // It holds the folder and trains.
        wait_for(|| lab.holder(&run) == Some(winner.id()));
        lab.wait_for_lines(&run, 2);
        assert!(winner.try_wait().unwrap().is_none(), "both ended");
        let name = format!("pid {} on host {}", winner.id(), host.trim());
        let loser = Done::of(loser.wait_with_output().unwrap()).exits(1);
        loser.says(&["another run is at work there", &name, "choose another output_dir"]);
        signal("KILL", winner.id());
        winner.wait().unwrap();
    }
    row.held(&format!("{times} of {times}: one trained, the other named its pid and host and exited 1"));
}

#[test]
fn r15_folders_that_no_run_can_work_in() {
    let row = Row::new("R15");
    // Data that is at fault, too: the folder is looked at before it, and long before the base.
    let lab = Lab::bare(&fixtures().join("llama"), "{\"prompt\": \"a\"}\n", "", "learning_rate = 1e-4");
    std::fs::write(lab.path("file"), "mine").unwrap();
    std::os::unix::fs::symlink(lab.path("nowhere"), lab.path("dangling")).unwrap();
    let mut cases = 0;
    for name in ["file", "file/below", "dangling"] {
        lab.train(name, &[]).exits(2).says(&["output_dir", name, "choose another output_dir"]);
        cases += 1;
    }
    assert_eq!(std::fs::read(lab.path("file")).unwrap(), b"mine");
    assert!(!lab.path("nowhere").exists());
    // Mounted read-only, which binds the superuser, too.
    std::fs::create_dir(lab.path("read-only")).unwrap();
    let script = "mount --bind \"$1\" \"$1\" && mount -o remount,ro,bind \"$1\" || exit 99; shift; exec \"$@\"";
    let started = Command::new("unshare")
        .args(["-rm", "sh", "-c", script, "sh"])
        .arg(lab.path("read-only"))
        .arg(LORA)
        .args(lab.args("read-only", &[]))
        .stdin(Stdio::null())
        .output();
    let done = started.ok().map(Done::of).filter(|done| done.code != Some(99) && !done.stderr.contains("unshare:"));
    match done {
        Some(done) => {
            done.exits(2).says(&["output_dir", "read-only", "Read-only file system", "choose another output_dir"]);
            row.held(&format!("{} of {0}: a file, a path below one, a dangling link, a read-only mount; before the data is read", cases + 1));
        }
        None => row.held(&format!("{cases} of {cases}: a file, a path below one, a dangling link; no read-only mount: `unshare -rm` cannot mount here")),
    }
}
