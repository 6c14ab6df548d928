//! D1 to D7: several processes that train together, one of which is killed, stopped, cut off, late, different or out of room.

use crate::inject::{NEEDS_STRACE, strace};
use crate::lab::{LORA, Lab, Random, metrics, signal};
use crate::report::{Row, extent};
use e2e::{Done, fixtures, small_dataset};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How far losses may lie apart between different numbers of processes: fp32 gradients that are summed in another order, and
/// AdamW's steps of them, over fifteen steps.
const SAME_LOSSES: f64 = 1e-4;
/// What a rank that was left alone may take to find out and to leave.
pub const LEAVES: Duration = Duration::from_secs(5);

fn lab() -> Lab {
    let train = "gradient_accumulation_steps = 4\nlearning_rate = 2e-2\nwarmup_steps = 3\nmax_steps = 15\nsave_steps = 5\n\
                 save_total_limit = 3\nddp_check_steps = 1";
    Lab::bare(&fixtures().join("llama"), &small_dataset(), "eval_split = 2", train)
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The variables of a rank.
pub fn place(command: &mut Command, rank: u32, world: u32, address: &str, port: u16) {
    command.env("RANK", rank.to_string()).env("WORLD_SIZE", world.to_string());
    command.env("MASTER_ADDR", address).env("MASTER_PORT", port.to_string());
}

/// A rank of a run on this machine.
fn rank(lab: &Lab, output: &str, (rank, world): (u32, u32), port: u16, more: &[&str]) -> Child {
    let mut command = lab.command(output, more);
    place(&mut command, rank, world, "127.0.0.1", port);
    command.spawn().unwrap()
}

pub fn ranks(lab: &Lab, output: &str, world: u32, more: &[&str]) -> Vec<Child> {
    let port = free_port();
    (0..world).map(|number| rank(lab, output, (number, world), port, more)).collect()
}

pub fn done(child: Child) -> Done {
    Done::of(child.wait_with_output().unwrap())
}

/// `lora launch` with so many ranks.
pub fn launch(lab: &Lab, output: &str, world: u32, more: &[&str]) -> Command {
    let mut command = Command::new(LORA);
    let args = lab.args(output, more);
    command.args(["launch", "-n", &world.to_string()]).args(&args[1..]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The run of two ranks that nothing happened to.
pub fn lab_of_two() -> Lab {
    let mut lab = lab();
    Done::of(launch(&lab, "whole", 2, &[]).output().unwrap()).exits(0);
    lab.whole = lab.outcome("whole");
    lab
}

#[track_caller]
pub fn two_go_on_as_if_nothing_had_happened(lab: &Lab, output: &str, what: &str) {
    let more: &[&str] = if lab.checkpoints(output).is_empty() { &[] } else { &["--resume"] };
    Done::of(launch(lab, output, 2, more).output().unwrap()).exits(0);
    lab.is_whole(output, what);
}

/// The losses and counts of two runs, within rounding.
#[track_caller]
fn same_steps(found: &Path, wanted: &Path) {
    let (found, wanted) = (metrics(found), metrics(wanted));
    assert_eq!(found.len(), wanted.len());
    for (found, wanted) in found.iter().zip(&wanted) {
        for (key, value) in wanted.as_object().unwrap() {
            let own = &found[key];
            match (value.as_f64().filter(|_| value.is_f64()), own.as_f64()) {
                (Some(value), Some(own)) if key != "grad_norm" => {
                    assert!((value - own).abs() <= SAME_LOSSES * value.abs().max(1.0), "{key}: {own} and not {value}");
                }
                (Some(_), Some(_)) => {}
                _ => assert_eq!(own, value, "{key}"),
            }
        }
    }
}

#[test]
fn d06_any_number_of_ranks_takes_the_same_steps() {
    let row = Row::new("D6");
    let lab = lab();
    lab.train("alone", &[]).exits(0);
    for world in [2, 4] {
        let output = format!("of-{world}");
        let told = Done::of(launch(&lab, &output, world, &["--json"]).output().unwrap()).exits(0);
        let report: serde_json::Value = serde_json::from_str(&told.stdout).unwrap();
        assert_eq!((report["status"].as_str(), report["steps"].as_u64()), (Some("finished"), Some(15)), "one report");
        same_steps(&lab.path(&output), &lab.path("alone"));
        lab.all_whole(&output, "ranks");
    }
    // It may go on with another number: the rows are the same, in the same order.
    let stopped = ["--set", "train.max_steps=6"];
    Done::of(launch(&lab, "changing", 2, &stopped).output().unwrap()).exits(0);
    let on = ["--resume", "--set", "train.max_steps=15"];
    lab.train("changing", &on).exits(0).says(&["world_size was 2 and is 1"]);
    let tokens =
        |run: &str| metrics(&lab.path(run)).iter().filter_map(|line| line["tokens"].as_u64()).collect::<Vec<_>>();
    assert_eq!(tokens("changing"), tokens("alone"));
    row.held("2 and 4 ranks with dropout against a process alone: the same rows, losses to 1e-4; 2 ranks resumed by 1");
}

#[test]
fn d01_a_killed_rank() {
    let row = Row::new("D1");
    let (lab, times) = (lab_of_two(), extent(4, 50));
    let (mut random, mut slowest) = (Random(1), Duration::ZERO);
    for i in 0..times {
        let (run, victim) = (format!("run-{i}"), i % 2);
        let mut both = ranks(&lab, &run, 2, &[]);
        lab.wait_for_lines(&run, 1 + random.below(6) as usize);
        std::thread::sleep(Duration::from_micros(random.below(20_000)));
        let killed = Instant::now();
        signal("KILL", both[victim].id());
        let left =
            done(both.remove(1 - victim)).exits(1).says(&[&format!("rank {victim} lost"), "start all ranks again"]);
        slowest = slowest.max(killed.elapsed());
        assert!(killed.elapsed() < LEAVES, "{:?}: {}", killed.elapsed(), left.stderr);
        done(both.remove(0));
        lab.all_whole(&run, "killed");
        two_go_on_as_if_nothing_had_happened(&lab, &run, "a rank was killed");
    }
    row.held(&format!(
        "{times} kills in turn of rank 0 and rank 1: the other left at most {:.1} s later and named it; 0 differences after going on",
        slowest.as_secs_f64()
    ));
}

#[test]
fn d01_a_launcher_ends_the_others() {
    let lab = lab();
    let launcher = launch(&lab, "run", 2, &["--set", "train.max_steps=5000"]).spawn().unwrap();
    lab.wait_for_lines("run", 2);
    signal("KILL", lab.holder("run").unwrap());
    let start = Instant::now();
    done(launcher).exits(1).says(&["rank 0 was ended by signal 9", "rank 0 lost"]);
    assert!(start.elapsed() < LEAVES, "{:?}", start.elapsed());
}

#[test]
fn d02_a_stopped_rank() {
    let row = Row::new("D2");
    let lab = lab();
    let mut told = Vec::new();
    for victim in [1usize, 0] {
        let run = format!("run-{victim}");
        let mut both = ranks(&lab, &run, 2, &["--set", "train.max_steps=5000", "--set", "train.ddp_timeout=3"]);
        lab.wait_for_lines(&run, 2);
        signal("STOP", both[victim].id());
        let start = Instant::now();
        done(both.remove(1 - victim)).exits(1).says(&[&format!("rank {victim} lost")]);
        let took = start.elapsed();
        assert!(took > Duration::from_secs(2) && took < Duration::from_secs(3) + LEAVES, "{took:?}");
        told.push(format!("{:.1} s", took.as_secs_f64()));
        signal("KILL", both[0].id());
        done(both.remove(0));
    }
    row.held(&format!(
        "with train.ddp_timeout = 3, rank 1 and then rank 0 stopped: the other left after {}",
        told.join(" and ")
    ));
}

#[test]
fn d03_a_rank_that_does_not_come() {
    let row = Row::new("D3");
    let lab = lab();
    let short = ["--set", "train.ddp_timeout=2"];
    let start = Instant::now();
    let port = free_port();
    done(rank(&lab, "run", (0, 3), port, &short)).exits(1).says(&["ranks 1, 2", &port.to_string(), "WORLD_SIZE"]);
    let nobody = free_port();
    done(rank(&lab, "run", (1, 2), nobody, &short)).exits(1).says(&[&format!("127.0.0.1:{nobody}"), "MASTER_ADDR"]);
    let mut wrong = lab.command("run", &short);
    place(&mut wrong, 1, 2, "no-such-host.invalid", port);
    done(wrong.spawn().unwrap()).exits(1).says(&["no-such-host.invalid", "MASTER_ADDR"]);
    let mut torn = lab.command("run", &short);
    torn.env("RANK", "1");
    done(torn.spawn().unwrap()).exits(2).says(&["WORLD_SIZE"]);
    let seconds = start.elapsed().as_secs_f64();
    assert!(start.elapsed() < Duration::from_secs(60), "{seconds}");
    assert!(!lab.path("run").exists(), "nothing was begun");
    row.held(&format!(
        "four kinds of it, each with its variable and within its time ({seconds:.1} s for all, 2 s each)"
    ));
}

#[test]
fn d04_ranks_of_different_runs() {
    let row = Row::new("D4");
    let lab = lab();
    std::fs::write(lab.path("other.jsonl"), small_dataset().replace("matrices", "matrix")).unwrap();
    let other = format!("data.train={}", lab.path("other.jsonl").display());
    for (more, named) in [
        (["--set", "lora.r=4"].as_slice(), "lora.r was 2 and is 4"),
        (&["--set", &other], "the sha256 of the data was"),
        (&["--resume"], "--resume was false and is true"),
    ] {
        let port = free_port();
        let lead = rank(&lab, "run", (0, 2), port, &[]);
        let odd = rank(&lab, "run", (1, 2), port, more);
        for child in [lead, odd] {
            done(child).exits(2).says(&["rank 1 was started for another run than rank 0", named]);
        }
        assert!(lab.checkpoints("run").is_empty());
    }
    let few = Done::of(launch(&lab, "run", 8, &[]).output().unwrap()).exits(2);
    few.says(&["train.gradient_accumulation_steps = 4 for 8 ranks"]);
    row.held(
        "another key, other data and --resume on rank 1: both ranks refuse with what differs, before a weight is read",
    );
}

#[test]
fn d05_a_full_disk_on_rank_0() {
    let row = Row::new("D5");
    let Some(_) = strace() else { return row.not_run(NEEDS_STRACE) };
    let lab = lab_of_two();
    let calls = extent(vec![2, 6, 25], (1..60).step_by(3).collect());
    let (mut by_word, mut by_loss) = (0, 0);
    for nth in &calls {
        let (run, port) = (format!("run-{nth}"), free_port());
        let inject = format!("inject=fsync:error=ENOSPC:when={nth}");
        let mut lead = Command::new("strace");
        lead.args(["-qq", "-f", "-o", "/dev/null", "-e", "trace=fsync", "-e", &inject, LORA]).args(lab.args(&run, &[]));
        place(&mut lead, 0, 2, "127.0.0.1", port);
        let lead = lead.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let other = rank(&lab, &run, (1, 2), port, &[]);
        let lead = done(lead);
        let start = Instant::now();
        let other = done(other);
        assert!(start.elapsed() < LEAVES, "{:?}", start.elapsed());
        if lead.code == Some(0) {
            // That call was of something that may fail.
            other.exits(0);
            continue;
        }
        lead.exits_with(&[1, 2]).says(&["No space left on device"]);
        let other = other.exits_with(&[1, 2]);
        match other.stderr.contains("rank 0 failed, and every rank left with it") {
            true => by_word += 1,
            false => by_loss += i32::from(other.stderr.contains("rank 0 lost")),
        }
        assert!(other.stderr.contains("rank 0 failed") || other.stderr.contains("rank 0 lost"), "{}", other.stderr);
        lab.all_whole(&run, "a full disk");
        two_go_on_as_if_nothing_had_happened(&lab, &run, "a full disk");
    }
    assert!(by_word + by_loss > 0, "no call failed");
    row.held(&format!(
        "ENOSPC at {} calls of rank 0: rank 1 left with it, {by_word} times told why and {by_loss} times by its loss; 0 differences",
        calls.len()
    ));
}

#[test]
fn d07_a_launcher_that_is_told_to_stop() {
    let row = Row::new("D7");
    let (lab, times) = (lab_of_two(), extent(3, 20));
    let (mut random, mut stopped) = (Random(7), 0);
    for i in 0..times {
        let (run, which) = (format!("run-{i}"), if i % 2 == 0 { "TERM" } else { "INT" });
        let launcher = launch(&lab, &run, 2, &["--json"]).spawn().unwrap();
        lab.wait_for_lines(&run, 1 + random.below(8) as usize);
        signal(which, launcher.id());
        let told = done(launcher).exits(0);
        let report: serde_json::Value = serde_json::from_str(&told.stdout).unwrap();
        lab.all_whole(&run, which);
        assert_eq!(lab.checkpoints(&run).last().copied(), report["steps"].as_u64(), "one step for all, and saved");
        if report["status"] == "stopped" {
            stopped += 1;
            two_go_on_as_if_nothing_had_happened(&lab, &run, which);
        }
    }
    assert!(stopped > 0, "none of {times} stopped in the middle");
    row.held(&format!(
        "{stopped} of {times} stopped in the middle, all ranks at one step, with one checkpoint; 0 differences"
    ));
}

#[test]
fn d01_torchrun_starts_killed_ranks_again() {
    if !e2e::has_program("torchrun") {
        return;
    }
    let lab = lab_of_two();
    let torchrun = |run: &str| {
        let quoted: Vec<String> = lab.args(run, &[]).iter().map(|arg| format!("'{arg}'")).collect();
        let checkpoints = lab.path(run).join("checkpoints").display().to_string();
        let line = format!("exec '{LORA}' {} $(test -d '{checkpoints}' && echo --resume)", quoted.join(" "));
        let mut command = Command::new("torchrun");
        command.args([
            "--standalone",
            "--nproc-per-node",
            "2",
            "--max-restarts",
            "1",
            "--no-python",
            "sh",
            "-c",
            &line,
        ]);
        command.env("OMP_NUM_THREADS", "1").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    done(torchrun("quiet")).exits(0);
    lab.is_whole("quiet", "torchrun");
    let launcher = torchrun("killed");
    lab.wait_for_lines("killed", 3);
    assert!(signal("KILL", lab.holder("killed").unwrap()));
    done(launcher).exits(0);
    lab.is_whole("killed", "torchrun started all again");
}
