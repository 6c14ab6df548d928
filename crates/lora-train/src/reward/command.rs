//! A program that rewards answers: a line of JSON in for each, a line with a number out for each.

use super::{Completion, Reward, RewardFault};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The last lines of what the program wrote on stderr are told when it fails.
const TOLD_LINES: usize = 10;
/// How long a program may take to end once nothing more comes.
const PARTING: Duration = Duration::from_secs(2);

/// What went wrong with the program.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("objective.reward_command is empty")]
    Empty,
    #[error("objective.reward_command: cannot start {program:?}: {source}")]
    Start {
        program: String,
        #[source]
        source: std::io::Error,
    },
    #[error("objective.reward_command: {program:?} ended ({status}) when {got} of {of} answers were rewarded{told}")]
    Ended { program: String, status: String, got: usize, of: usize, told: String },
    #[error(
        "objective.reward_command: {program:?} wrote nothing for {} s when {got} of {of} answers were rewarded; it must write a \
         line for each line that it reads, and flush it; objective.reward_timeout gives it more time{told}", timeout.as_secs_f64()
    )]
    Stuck { program: String, timeout: Duration, got: usize, of: usize, told: String },
    #[error(
        "objective.reward_command: {program:?} wrote {line:?}, which must be a finite number, or a table with one as `reward`{told}"
    )]
    NoNumber { program: String, line: String, told: String },
    #[error("cannot write an answer as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// Asks a program, which is started once and goes on to the end of the run: what takes it long to load is loaded once.
#[derive(Debug)]
pub struct RewardCommand {
    command: Vec<String>,
    timeout: Duration,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    child: Child,
    /// Lines to the program; a thread writes them, so that a program that does not read cannot hold the run.
    to: Sender<String>,
    /// Lines from the program.
    from: Receiver<String>,
    /// The last lines that it wrote on stderr.
    said: Arc<Mutex<VecDeque<String>>>,
}

impl RewardCommand {
    /// Starts a program with its arguments, which is held to be stuck when it writes no line for `timeout`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(command: Vec<String>, timeout: Duration) -> Result<Self, RewardFault> {
        let mut own = Self { command, timeout, running: None };
        own.running = Some(own.spawn()?);
        Ok(own)
    }

    fn spawn(&self) -> Result<Running, Fault> {
        let [program, arguments @ ..] = self.command.as_slice() else { return Err(Fault::Empty) };
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Python would keep its lines back otherwise.
        command.env("PYTHONUNBUFFERED", "1");
        #[cfg(unix)]
        {
            // Ctrl-C is for the run, which finishes its step and needs the rewards for it.
            std::os::unix::process::CommandExt::process_group(&mut command, 0);
        }
        let failed = |source| Fault::Start { program: program.clone(), source };
        let mut child = command.spawn().map_err(failed)?;
        let (to, lines_to) = channel::<String>();
        let (lines_from, from) = channel();
        let said = Arc::new(Mutex::new(VecDeque::new()));
        if let Some(mut stdin) = child.stdin.take() {
            // It ends when the program does, or the sender is gone.
            std::thread::spawn(move || lines_to.iter().try_for_each(|line| stdin.write_all(line.as_bytes())));
        }
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || lines(stdout).all(|line| lines_from.send(line).is_ok()));
        }
        if let Some(stderr) = child.stderr.take() {
            let said = Arc::clone(&said);
            std::thread::spawn(move || {
                for line in lines(stderr) {
                    let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
                    said.push_back(line);
                    if said.len() > TOLD_LINES {
                        said.pop_front();
                    }
                }
            });
        }
        Ok(Running { child, to, from, said })
    }

    fn ask(&self, running: &mut Running, answers: &[Completion<'_>]) -> Result<Vec<f64>, Fault> {
        let (program, of) = (self.command.first().cloned().unwrap_or_default(), answers.len());
        for answer in answers {
            // Where the program has ended, the next line that is missing says so.
            let _ = running.to.send(format!("{}\n", serde_json::to_string(answer)?));
        }
        let mut rewards = Vec::with_capacity(of);
        while rewards.len() < of {
            let got = rewards.len();
            match running.from.recv_timeout(self.timeout) {
                Ok(line) => match number(&line) {
                    Some(reward) => rewards.push(reward),
                    None => return Err(Fault::NoNumber { program, line, told: running.told() }),
                },
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Fault::Stuck { program, timeout: self.timeout, got, of, told: running.told() });
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let status = running.end().unwrap_or_else(|| "it closed its output".into());
                    return Err(Fault::Ended { program, status, got, of, told: running.told() });
                }
            }
        }
        Ok(rewards)
    }
}

impl Reward for RewardCommand {
    fn score(&mut self, answers: &[Completion<'_>]) -> Result<Vec<f64>, RewardFault> {
        let mut running = match self.running.take() {
            Some(running) => running,
            None => self.spawn()?,
        };
        // After a fault its lines and ours would no longer belong together.
        let rewards = self.ask(&mut running, answers)?;
        self.running = Some(running);
        Ok(rewards)
    }
}

impl Running {
    /// How the program ended, if it does so soon.
    fn end(&mut self) -> Option<String> {
        let until = Instant::now() + PARTING;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status.to_string()),
                Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
                _ => return None,
            }
        }
    }

    /// What the program last said on stderr.
    fn told(&self) -> String {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.is_empty() {
            return String::new();
        }
        format!(". It said:\n{}", said.iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Without a sender the program's input ends, and it may end by itself.
        let (closed, _) = channel();
        drop(std::mem::replace(&mut self.to, closed));
        if self.end().is_none() {
            // With what it has started itself: the group is its own.
            #[cfg(unix)]
            if let Some(group) = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The lines of a stream, whatever bytes are in them.
fn lines(stream: impl Read) -> impl Iterator<Item = String> {
    let of = |line: Vec<u8>| String::from_utf8_lossy(&line).trim_end().to_string();
    BufReader::new(stream).split(b'\n').map_while(Result::ok).map(of)
}

/// A number, or the one that is called `reward`.
fn number(line: &str) -> Option<f64> {
    let value: serde_json::Value = serde_json::from_str(line).ok()?;
    value.get("reward").unwrap_or(&value).as_f64().filter(|reward| reward.is_finite())
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn ask(script: &str, timeout: f64, answers: usize) -> Result<Vec<f64>, String> {
        let command = ["sh", "-c", script].map(String::from).to_vec();
        let mut command = RewardCommand::start(command, Duration::from_secs_f64(timeout)).map_err(|e| e.to_string())?;
        let one = Completion { prompt: "p", completion: "c", answer: "a", ended: true };
        let first = command.score(&vec![one; answers]).map_err(|e| e.to_string())?;
        // The same program is asked again.
        let second = command.score(&vec![one; answers]).map_err(|e| e.to_string())?;
        Ok([first, second].concat())
    }

    #[test]
    fn a_program_gives_a_number_for_every_line() {
        let counting = "n=0; while read -r line; do n=$((n+1)); echo \"$n\"; done";
        assert_eq!(ask(counting, 60.0, 2).unwrap(), [1.0, 2.0, 3.0, 4.0]);
        let table = "while read -r line; do echo '{\"reward\": -0.5, \"why\": \"so\"}'; done";
        assert_eq!(ask(table, 60.0, 1).unwrap(), [-0.5, -0.5]);
        // More than a pipe holds, both ways, before anything is read back.
        assert_eq!(ask("while read -r line; do echo 1; done", 60.0, 5000).unwrap().len(), 10_000);
        let reads =
            "while read -r line; do case \"$line\" in *'\"completion\":\"c\"'*) echo 1;; *) echo 0;; esac; done";
        assert_eq!(ask(reads, 60.0, 1).unwrap(), [1.0, 1.0]);
    }

    #[test]
    fn a_program_that_fails_is_named_with_what_it_said() {
        let says = |script: &str, timeout, parts: &[&str]| {
            let error = ask(script, timeout, 2).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        };
        says(
            "read -r l; echo 1; echo broken pipe dream >&2; exit 3",
            60.0,
            &["exit status: 3", "1 of 2", "pipe dream"],
        );
        says("while read -r l; do echo nan; done", 60.0, &["\"nan\"", "finite number"]);
        says("while read -r l; do echo; done", 60.0, &["\"\""]);
        says("cat > /dev/null", 0.2, &["wrote nothing for 0.2 s", "0 of 2", "flush"]);
        // What a program has started itself goes with it.
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        says(&format!("sleep 600 & echo $! > {}; wait", pid.display()), 0.5, &["wrote nothing"]);
        let pid: i32 = std::fs::read_to_string(pid).unwrap().trim().parse().unwrap();
        let gone = |pid: i32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        };
        let until = Instant::now() + Duration::from_secs(20);
        while !gone(pid) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(gone(pid), "{pid} is still there");
        let none = RewardCommand::start(vec!["/no/such/program".into()], Duration::from_secs(1));
        assert!(none.unwrap_err().to_string().contains("cannot start"));
    }
}
