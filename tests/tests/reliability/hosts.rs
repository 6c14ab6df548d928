//! D8: two hosts, which are namespaces of the network with addresses of their own and a cable between them.

use crate::inject::{NEEDS_STRACE, strace};
use crate::lab::{LORA, Lab, Random, signal};
use crate::ranks::{LEAVES, done, lab_of_two, place, two_go_on_as_if_nothing_had_happened};
use crate::report::{Row, extent};
use std::cell::Cell;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// For runs that end by what happens to them.
const LONG: &str = "train.max_steps=50000";
const WAIT: &str = "train.ddp_timeout=3";
const WAITS: Duration = Duration::from_secs(3);

/// They go when this is dropped.
struct Hosts {
    names: [String; 2],
    /// The port of the last run.
    port: Cell<u16>,
}

impl Hosts {
    fn new() -> Result<Self, String> {
        let tag = std::process::id();
        let hosts = Self { names: [format!("lora-a{tag}"), format!("lora-b{tag}")], port: Cell::new(29_500) };
        let [a, b] = &hosts.names;
        let (left, right) = (format!("la{}", tag % 100_000), format!("lb{}", tag % 100_000));
        for line in [
            format!("netns add {a}"),
            format!("netns add {b}"),
            format!("link add {left} type veth peer name {right}"),
            format!("link set {left} netns {a} name cable"),
            format!("link set {right} netns {b} name cable"),
            format!("-n {a} addr add 10.77.0.1/24 dev cable"),
            format!("-n {b} addr add 10.77.0.2/24 dev cable"),
            format!("-n {a} link set cable up"),
            format!("-n {b} link set cable up"),
            format!("-n {a} link set lo up"),
            format!("-n {b} link set lo up"),
        ] {
            Self::ip(&line)?;
        }
        Ok(hosts)
    }

    fn ip(line: &str) -> Result<(), String> {
        let output = Command::new("ip").args(line.split(' ')).output().map_err(|e| format!("ip: {e}"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() { Ok(()) } else { Err(format!("ip {line}: {}", said.trim())) }
    }

    /// Plugs one end of the cable in or out.
    fn plug(&self, host: usize, state: &str) {
        Self::ip(&format!("-n {} link set cable {state}", self.names[host])).unwrap();
    }

    /// A rank on the host of its number, as a child of `program`.
    fn rank(&self, lab: &Lab, run: &str, rank: u32, program: &[&str], more: &[&str]) -> Child {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[rank as usize]]).args(program).arg(LORA).args(lab.args(run, more));
        place(&mut command, rank, 2, "10.77.0.1", self.port.get());
        command.env("GLOO_SOCKET_IFNAME", "cable");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn next_port(&self) {
        self.port.set(self.port.get() + 1);
    }

    fn both(&self, lab: &Lab, run: &str, more: &[&str]) -> Vec<Child> {
        self.next_port();
        (0..2).map(|rank| self.rank(lab, run, rank, &[], more)).collect()
    }

    /// Cuts the cable at any moment of a step, at either end; returns how long the ranks took at most to leave.
    fn cuts(&self, lab: &Lab, times: usize) -> Duration {
        let (mut random, mut slowest) = (Random(8), Duration::ZERO);
        for i in 0..times {
            let run = format!("cut-{i}");
            let both = self.both(lab, &run, &["--set", LONG, "--set", WAIT]);
            lab.wait_for_lines(&run, 1 + random.below(6) as usize);
            std::thread::sleep(Duration::from_micros(random.below(20_000)));
            self.plug(i % 2, "down");
            let start = Instant::now();
            for (child, other) in both.into_iter().zip([1, 0]) {
                done(child).exits(1).says(&[&format!("rank {other} lost")]);
            }
            let took = start.elapsed();
            assert!(took < WAITS + LEAVES, "{took:?}");
            slowest = slowest.max(took);
            lab.all_whole(&run, "a cut cable");
            self.plug(i % 2, "up");
        }
        slowest
    }

    /// Kills or stops a rank on either host; returns how long the other took at most to leave.
    fn hurt(&self, lab: &Lab, which: &str, most: Duration) -> Duration {
        let mut slowest = Duration::ZERO;
        for victim in [1usize, 0] {
            let run = format!("{which}-{victim}");
            let mut both = self.both(lab, &run, &["--set", LONG, "--set", WAIT]);
            lab.wait_for_lines(&run, 2);
            let hurt = both.remove(victim);
            signal(which, hurt.id());
            let start = Instant::now();
            both.into_iter().for_each(|other| {
                done(other).exits(1).says(&[&format!("rank {victim} lost")]);
            });
            let took = start.elapsed();
            assert!(took < most, "{which}: {took:?}");
            slowest = slowest.max(took);
            signal("KILL", hurt.id());
            done(hurt);
            lab.all_whole(&run, which);
        }
        slowest
    }

    /// A rank that does not come, on either host, and one that was started for another run.
    fn alone_and_different(&self, lab: &Lab) {
        let wait = ["--set", "train.ddp_timeout=2"];
        self.next_port();
        done(self.rank(lab, "nobody", 0, &[], &wait)).exits(1).says(&["rank 1", "WORLD_SIZE"]);
        done(self.rank(lab, "nobody", 1, &[], &wait)).exits(1).says(&["10.77.0.1", "MASTER_ADDR"]);
        self.next_port();
        let both = [self.rank(lab, "odd", 0, &[], &[]), self.rank(lab, "odd", 1, &[], &["--set", "lora.r=4"])];
        for child in both {
            done(child).exits(2).says(&["rank 1 was started for another run than rank 0", "lora.r was 2 and is 4"]);
        }
    }

    /// A disk that is full at the given flush of rank 0; returns whether that ended the run.
    fn full_disk(&self, lab: &Lab, nth: usize) -> bool {
        let run = format!("full-{nth}");
        let inject = format!("inject=fsync:error=ENOSPC:when={nth}");
        let strace = ["strace", "-qq", "-f", "-o", "/dev/null", "-e", "trace=fsync", "-e", &inject];
        self.next_port();
        let (lead, other) = (self.rank(lab, &run, 0, &strace, &[]), self.rank(lab, &run, 1, &[], &[]));
        let lead = done(lead);
        let start = Instant::now();
        let other = done(other);
        if lead.code == Some(0) {
            // That flush was of something that may fail.
            other.exits(0);
            return false;
        }
        lead.exits_with(&[1, 2]).says(&["No space left on device"]);
        let other = other.exits_with(&[1, 2]);
        assert!(other.stderr.contains("rank 0 failed") || other.stderr.contains("rank 0 lost"), "{}", other.stderr);
        assert!(start.elapsed() < LEAVES, "{:?}", start.elapsed());
        lab.all_whole(&run, "a full disk");
        two_go_on_as_if_nothing_had_happened(lab, &run, "a full disk");
        true
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Self::ip(&format!("netns del {name}"));
        }
    }
}

#[test]
fn d08_two_hosts_and_what_goes_wrong_between_them() {
    let row = Row::new("D8");
    let hosts = match Hosts::new() {
        Ok(hosts) => hosts,
        Err(why) => return row.not_run(&format!("no namespaces of the network: {why}")),
    };
    let Some(_) = strace() else { return row.not_run(NEEDS_STRACE) };
    let lab = lab_of_two();
    for child in hosts.both(&lab, "run", &[]) {
        done(child).exits(0);
    }
    lab.is_whole("run", "two hosts");
    let times = extent(2, 40);
    let cut = hosts.cuts(&lab, times);
    let killed = hosts.hurt(&lab, "KILL", LEAVES);
    let stopped = hosts.hurt(&lab, "STOP", WAITS + LEAVES);
    hosts.alone_and_different(&lab);
    let flushes = extent(vec![2, 12], (2..40).step_by(5).collect());
    let full = flushes.iter().filter(|nth| hosts.full_disk(&lab, **nth)).count();
    assert!(full > 0, "no flush failed");
    row.held(&format!(
        "a run of two namespaces as on one host, 0 differences; with train.ddp_timeout = 3 and the cable cut at a random moment \
         {times} times both ranks left within {:.1} s and named each other; a rank killed on either host: the other left within {:.1} s; \
         stopped: {:.1} s; one that does not come, another configuration, a full disk that ended {full} runs: as on one host",
        cut.as_secs_f64(),
        killed.as_secs_f64(),
        stopped.as_secs_f64()
    ));
}
