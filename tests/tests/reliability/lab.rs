//! A small run that can be started, hurt and compared with one that nothing happened to.

use e2e::{Done, fixtures, small_dataset};
use lora_train::checkpoint::verify_checkpoint;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub const LORA: &str = env!("CARGO_BIN_EXE_lora-e2e");

/// Nothing here takes nearly as long on any machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// What a run comes to, without what depends on the clock and the machine.
#[derive(PartialEq)]
pub struct Outcome {
    files: BTreeMap<String, Vec<u8>>,
    metrics: Vec<serde_json::Value>,
}

/// A folder with a dataset, a configuration, and the result of the run that nothing happened to, in `whole`.
pub struct Lab {
    pub dir: tempfile::TempDir,
    pub whole: Outcome,
    /// How long that run took.
    pub seconds: f64,
    /// Further arguments of runs that start or go on after a fault.
    pub after: &'static [&'static str],
}

/// The steps of the run, which saves each `SAVE` of them.
pub const STEPS: u64 = 15;
pub const SAVE: u64 = 5;

impl Lab {
    /// Adapters in the middle of everything: dropout, accumulation, epochs of three and a half batches, evaluations.
    pub fn new() -> Self {
        Self::with("", &format!("max_steps = {STEPS}\nsave_steps = {SAVE}\nsave_total_limit = 3"))
    }

    /// The same with other lines for `[data]` and `[train]`.
    pub fn with(data: &str, train: &str) -> Self {
        let train = format!("gradient_accumulation_steps = 2\nlearning_rate = 2e-2\nwarmup_steps = 3\n{train}");
        let mut lab =
            Self::bare(&fixtures().join("llama"), &small_dataset(), &format!("eval_split = 2\n{data}"), &train);
        lab.run_whole();
        lab
    }

    /// A model, a dataset and a configuration, and no run yet.
    pub fn bare(model: &Path, dataset: &str, data: &str, train: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("train.jsonl"), dataset).unwrap();
        let text = format!(
            "seed = 3\n[model]\npath = {model:?}\ndevice = \"cpu\"\nthreads = 1\n[lora]\nr = 2\ntarget_modules = [\"q_proj\", \"v_proj\"]\nlora_dropout = 0.1\n\
             [data]\ntrain = {:?}\nmax_length = 96\n{data}\n\
             [train]\nper_device_train_batch_size = 2\nlr_scheduler_type = \"cosine\"\neval_steps = 10\nsample_max_new_tokens = 4\n{train}\n",
            dir.path().join("train.jsonl"),
        );
        std::fs::write(dir.path().join("run.toml"), text).unwrap();
        Self { dir, whole: Outcome { files: BTreeMap::new(), metrics: Vec::new() }, seconds: 0.0, after: &[] }
    }

    /// Runs to the end with nothing happening: what every other run is compared with.
    pub fn run_whole(&mut self) {
        let start = Instant::now();
        self.train("whole", self.after).exits(0);
        self.seconds = start.elapsed().as_secs_f64();
        self.whole = self.outcome("whole");
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The command of a run in the folder `output`.
    pub fn args(&self, output: &str, more: &[&str]) -> Vec<String> {
        let text = |name: &str| self.path(name).display().to_string();
        let mut args: Vec<String> =
            ["train", &text("run.toml"), "--output", &text(output), "--quiet"].map(String::from).into();
        args.extend(more.iter().map(|arg| arg.to_string()));
        args
    }

    pub fn command(&self, output: &str, more: &[&str]) -> Command {
        let mut command = Command::new(LORA);
        command.args(self.args(output, more)).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn train(&self, output: &str, more: &[&str]) -> Done {
        Done::of(self.command(output, more).output().unwrap())
    }

    pub fn start(&self, output: &str, more: &[&str]) -> Child {
        self.command(output, more).spawn().unwrap()
    }

    /// Starts anew or goes on, by whether there is a checkpoint.
    pub fn go_on(&self, output: &str) -> Child {
        let more: &[&str] = if self.checkpoints(output).is_empty() { &[] } else { &["--resume"] };
        self.start(output, &[more, self.after].concat())
    }

    /// Goes on to the end, which must be that of the run that nothing happened to.
    #[track_caller]
    pub fn ends_as_if_nothing_had_happened(&self, output: &str, what: &str) {
        let done = Done::of(self.go_on(output).wait_with_output().unwrap());
        assert!(done.code == Some(0), "{what}: going on failed: {done:#?}");
        self.is_whole(output, what);
    }

    /// The folder holds what the run that nothing happened to left, and nothing half written.
    #[track_caller]
    pub fn is_whole(&self, output: &str, what: &str) {
        let found = self.outcome(output);
        for (name, bytes) in &self.whole.files {
            assert!(found.files.get(name) == Some(bytes), "{what}: {name} differs");
        }
        assert_eq!(found.metrics, self.whole.metrics, "{what}");
        assert_eq!(found.files.len(), self.whole.files.len(), "{what}: {:?}", found.files.keys());
        for folder in [self.path(output), self.path(output).join("checkpoints")] {
            let half: Vec<_> =
                names(&folder).into_iter().filter(|n| n.starts_with(".tmp-") || n.starts_with(".probe")).collect();
            assert!(half.is_empty(), "{what}: left behind: {half:?}");
        }
    }

    /// The adapter is that of the run that nothing happened to.
    #[track_caller]
    pub fn has_the_adapter(&self, output: &str, what: &str) {
        const NAME: &str = "adapter_model.safetensors";
        let bytes = std::fs::read(self.path(output).join(NAME)).unwrap();
        assert!(self.whole.files.get(NAME) == Some(&bytes), "{what}: {NAME} differs");
    }

    pub fn outcome(&self, output: &str) -> Outcome {
        let run = self.path(output);
        let last = format!("checkpoints/step-{}", self.checkpoints(output).last().unwrap());
        let mut files = contents(&run);
        files.retain(|name, _| {
            let of_the_clock = ["metrics.jsonl", ".lock", "report.html", "run.json"];
            !of_the_clock.contains(&name.as_str()) && !name.contains("tfevents")
        });
        for (name, bytes) in contents(&run.join(&last)) {
            // The manifest has the seconds of the run in it; of what it says of the files, each is compared.
            if name != "manifest.json" {
                files.insert(format!("{last}/{name}"), bytes);
            }
        }
        // It names its folder.
        if let Some(config) = files.get_mut("config.resolved.toml") {
            let text = String::from_utf8(config.clone()).unwrap();
            let own = |line: &&str| !line.starts_with("output_dir") && !line.starts_with("save_total_limit");
            *config = text.lines().filter(own).collect::<String>().into_bytes();
        }
        Outcome { files, metrics: metrics(&run) }
    }

    /// The steps of the checkpoints, the last one last. What bears the name must be whole.
    pub fn checkpoints(&self, output: &str) -> Vec<u64> {
        let folder = self.path(output).join("checkpoints");
        let steps = |name: String| name.strip_prefix("step-").and_then(|step| step.parse().ok());
        let mut steps: Vec<u64> = names(&folder).into_iter().filter_map(steps).collect();
        steps.sort_unstable();
        steps
    }

    /// Every folder that bears the name of a checkpoint is a whole one.
    #[track_caller]
    pub fn all_whole(&self, output: &str, what: &str) {
        for step in self.checkpoints(output) {
            let dir = self.checkpoint(output, step);
            assert!(verify_checkpoint(&dir).is_ok(), "{what}: {:?}", verify_checkpoint(&dir).err());
        }
    }

    pub fn checkpoint(&self, output: &str, step: u64) -> PathBuf {
        self.path(output).join(format!("checkpoints/step-{step}"))
    }

    /// A run that ended behind its last checkpoint but one: `[SAVE, 2 SAVE]` are there, and nothing of what followed.
    pub fn interrupted(&self, output: &str) -> PathBuf {
        let run = self.path(output);
        let _ = std::fs::remove_dir_all(&run);
        copy(&self.path("whole"), &run);
        std::fs::remove_dir_all(self.checkpoint(output, STEPS)).unwrap();
        let kept = ["metrics.jsonl", "samples.jsonl", "config.resolved.toml", "checkpoints"];
        for name in names(&run).iter().filter(|name| !kept.contains(&name.as_str())) {
            std::fs::remove_file(run.join(name)).unwrap();
        }
        assert_eq!(self.checkpoints(output), [SAVE, 2 * SAVE]);
        run
    }

    /// Waits until the run in `output` has written so many lines of metrics.
    pub fn wait_for_lines(&self, output: &str, lines: usize) {
        let log = self.path(output).join("metrics.jsonl");
        wait_for(|| std::fs::read_to_string(&log).is_ok_and(|text| text.lines().count() >= lines));
    }

    /// The process that holds the folder.
    pub fn holder(&self, output: &str) -> Option<u32> {
        let text = std::fs::read_to_string(self.path(output).join(".lock")).ok()?;
        serde_json::from_str::<serde_json::Value>(&text).ok()?["pid"].as_u64()?.try_into().ok()
    }
}

/// Sends a signal; whether the process was there to take it.
pub fn signal(name: &str, pid: u32) -> bool {
    Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).stderr(Stdio::null()).status().unwrap().success()
}

/// Waits until something is so.
#[track_caller]
pub fn wait_for(so: impl Fn() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < PATIENCE, "waited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The lines of `metrics.jsonl` without what depends on the clock and the machine.
pub fn metrics(run: &Path) -> Vec<serde_json::Value> {
    let clean = |line: &str| {
        let mut v: serde_json::Value = serde_json::from_str(line).unwrap();
        for key in ["seconds", "data_seconds", "tokens_per_second", "peak_memory_bytes"] {
            v.as_object_mut().unwrap().remove(key);
        }
        v
    };
    std::fs::read_to_string(run.join("metrics.jsonl")).unwrap().lines().map(clean).collect()
}

/// The names in a folder, none where there is no folder.
pub fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> = entries.flatten().map(|e| e.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The files of a folder by name, without those of folders in it.
pub fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = names(folder).into_iter().filter(|name| folder.join(name).is_file());
    files.map(|name| (name.clone(), std::fs::read(folder.join(name)).unwrap())).collect()
}

/// Copies a folder with all that is in it.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for name in names(from) {
        let (from, to) = (from.join(&name), to.join(&name));
        if from.is_dir() {
            copy(&from, &to);
        } else {
            std::fs::copy(&from, &to).unwrap();
        }
    }
}

/// Numbers that look random and are the same each time (Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", 2014).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n
    }
}
