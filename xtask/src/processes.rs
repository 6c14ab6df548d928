//! `bench --processes`: what several processes gain, and what their exchanges take, on this machine and over a slower link.

use std::fmt::Write as _;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::cargo::{Workspace, capture, shown};
use crate::{doctor, setup};

/// What is measured.
#[derive(clap::Args)]
pub struct Args {
    /// Measure processes that train together; takes some minutes
    #[arg(long, conflicts_with_all = ["report", "filter", "compare", "against_datasets", "against_full"])]
    processes: bool,
    /// Optimizer steps of each run, of which the first does not count
    #[arg(long, default_value_t = 7, value_name = "N", requires = "processes")]
    measured_steps: u64,
    /// Rates of the slower link in Mbit/s
    #[arg(long, value_delimiter = ',', default_value = "200,50,20,10,5", requires = "processes")]
    link_rates: Vec<u32>,
    /// Write the figures as a Markdown page, too
    #[arg(long, value_name = "FILE", requires = "processes")]
    processes_page: Option<PathBuf>,
}

impl Args {
    /// Whether this was asked for.
    pub fn wanted(&self) -> bool {
        self.processes
    }
}

/// Layers, hidden, key and value width, feed-forward of models whose adapters are exchanged; r = 16 on every linear layer.
const SHAPES: [(&str, u64, [u64; 4]); 3] =
    [("1B", 16, [16, 2048, 512, 8192]), ("8B", 16, [32, 4096, 1024, 14336]), ("70B", 16, [80, 8192, 1024, 28672])];
/// Words of a row of the run that is timed, and more than its tokens; a step has `ROWS` of them in `MICRO` micro-batches.
const WORDS: usize = 90;
const LONGEST: usize = 512;
const ROWS: u64 = 8;
const MICRO: u64 = 4;

/// Numbers of an adapter of rank `r` on every linear layer.
fn adapter_numbers(r: u64, [layers, h, kv, ffn]: [u64; 4]) -> u64 {
    layers * r * (2 * (h + h) + 2 * (h + kv) + 3 * (h + ffn))
}

/// The median step of a run: its tokens a second, its tokens and its seconds.
struct Speed {
    rate: f64,
    tokens: f64,
    step: f64,
}

/// Measures everything and prints it.
pub fn run(ws: &Workspace, args: &Args) -> Result<()> {
    setup::ensure(ws)?;
    let lora = ws.build_lora()?;
    let work = ws.target()?.join("processes");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    prepare(ws, &lora, &work)?;
    let bench = Bench { lora, work, steps: args.measured_steps };

    let one = bench.alone(1)?;
    let two = bench.together(None)?;
    let threads = bench.alone(2)?;
    let mut text = opening(&bench, &one)?;
    writeln!(text, "| | tokens a second | to one rank | efficiency |\n| --- | ---: | ---: | ---: |")?;
    for (name, speed, cores) in
        [("1 rank of 1 thread", &one, 1.0), ("2 ranks of 1 thread", &two, 2.0), ("1 rank of 2 threads", &threads, 2.0)]
    {
        let gain = speed.rate / one.rate;
        writeln!(text, "| {name} | {:.0} | {gain:.2} | {:.0} % |", speed.rate, 100.0 * gain / cores)?;
    }
    exchanges(&bench, &mut text)?;
    links(&bench, &args.link_rates, &one, &mut text)?;
    println!("\n{text}");
    if let Some(path) = &args.processes_page {
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The model, of random weights, and the rows, each cut at the same length.
fn prepare(ws: &Workspace, lora: &Path, work: &Path) -> Result<()> {
    let shape = work.join("shape");
    fs::create_dir_all(&shape)?;
    let fixture = ws.root.join("tests/fixtures/llama");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixture.join(name), shape.join(name)).with_context(|| format!("cannot copy {name}"))?;
    }
    let mut config: Value = serde_json::from_str(&fs::read_to_string(fixture.join("config.json"))?)?;
    for (key, value) in [
        ("hidden_size", json!(512)),
        ("intermediate_size", json!(1408)),
        ("num_hidden_layers", json!(8)),
        ("num_attention_heads", json!(8)),
        ("num_key_value_heads", json!(8)),
        ("head_dim", json!(64)),
        ("max_position_embeddings", json!(LONGEST)),
    ] {
        config[key] = value;
    }
    fs::write(shape.join("config.json"), config.to_string())?;
    let mut init = Command::new(lora);
    init.arg("init-model").arg("--config").arg(shape.join("config.json")).arg("--output").arg(work.join("model"));
    capture(&mut init)?;
    let words = ["the", "weight", "of", "a", "matrix", "is", "what", "it", "learns"];
    let row = |i: usize| {
        let text: Vec<&str> = (0..WORDS).map(|k| words[(i * 7 + k * 3 + k / 5) % words.len()]).collect();
        format!("{}\n", json!({ "text": text.join(" ") }))
    };
    fs::write(work.join("rows.jsonl"), (0..64).map(row).collect::<String>())?;
    Ok(())
}

/// What runs are started with.
struct Bench {
    lora: PathBuf,
    work: PathBuf,
    steps: u64,
}

impl Bench {
    /// The arguments of a run with so many threads, and the folder it writes.
    fn train(&self, threads: u32, name: &str) -> (Vec<String>, PathBuf) {
        let out = self.work.join(name);
        let (model, rows) = (self.work.join("model"), self.work.join("rows.jsonl"));
        let mut args: Vec<String> = ["train", "--quiet", "--device", "cpu", "--threads"].map(String::from).into();
        args.extend([threads.to_string(), "--model".into(), model.display().to_string()]);
        args.extend(["--data".into(), rows.display().to_string(), "--output".into(), out.display().to_string()]);
        for (key, value) in [
            ("train.max_steps", self.steps.to_string()),
            ("train.per_device_train_batch_size", (ROWS / MICRO).to_string()),
            ("train.gradient_accumulation_steps", MICRO.to_string()),
            ("train.sample_count", "0".into()),
            ("train.save_steps", "0".into()),
            ("lora.r", "16".into()),
            ("data.max_length", LONGEST.to_string()),
            ("data.cache", "never".into()),
        ] {
            args.extend(["--set".into(), format!("{key}={value}")]);
        }
        (args, out)
    }

    fn alone(&self, threads: u32) -> Result<Speed> {
        let (args, out) = self.train(threads, &format!("one-of-{threads}"));
        capture(Command::new(&self.lora).args(args).env("OMP_NUM_THREADS", threads.to_string()))?;
        speed(&out)
    }

    /// Two ranks of one thread, on this machine or at the two ends of a link.
    fn together(&self, link: Option<&Link>) -> Result<Speed> {
        let name = link.map_or("two".into(), |link| format!("two-at-{}", link.rate));
        let (args, out) = self.train(1, &name);
        self.ranks(&args, link)?;
        speed(&out)
    }

    /// Runs the program as two ranks and returns what rank 0 printed.
    fn ranks(&self, args: &[String], link: Option<&Link>) -> Result<String> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let start = |rank: usize| -> Result<Child> {
            let mut command = match link {
                None => Command::new(&self.lora),
                Some(link) => {
                    let mut inside = Command::new("ip");
                    inside.args(["netns", "exec", &link.names[rank]]).arg(&self.lora);
                    inside.env("GLOO_SOCKET_IFNAME", "cable");
                    inside
                }
            };
            command.args(args).env("RANK", rank.to_string()).env("WORLD_SIZE", "2").env("OMP_NUM_THREADS", "1");
            command.env("MASTER_ADDR", if link.is_some() { ADDRESSES[0] } else { "127.0.0.1" });
            command.env("MASTER_PORT", port.to_string()).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().with_context(|| format!("cannot start `{}`", shown(&command)))
        };
        let (lead, other) = (start(0)?, start(1)?);
        let mut said = Vec::new();
        for child in [lead, other] {
            let output = child.wait_with_output()?;
            ensure!(output.status.success(), "a rank failed: {}", String::from_utf8_lossy(&output.stderr).trim());
            said.push(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Ok(said.swap_remove(0))
    }

    /// Seconds of a sum and of a way there and back, of buffers of so many numbers.
    fn exchange(&self, numbers: &[u64], link: Option<&Link>) -> Result<Vec<[f64; 2]>> {
        let list: Vec<String> = numbers.iter().map(u64::to_string).collect();
        let args = ["bench", "exchange", "--json", "--repeats", "3", "--numbers", &list.join(",")].map(String::from);
        let number = |line: &Value, key: &str| line[key].as_f64().with_context(|| format!("no {key} was printed"));
        let lines = self.ranks(&args, link)?;
        let line = |text: &str| {
            let line: Value = serde_json::from_str(text)?;
            Ok([number(&line, "sum")?, number(&line, "there_and_back")?])
        };
        lines.lines().map(line).collect()
    }
}

/// The median step of a run, the first left out.
fn speed(out: &Path) -> Result<Speed> {
    let text = fs::read_to_string(out.join("metrics.jsonl"))?;
    let lines = text.lines().map(serde_json::from_str).collect::<serde_json::Result<Vec<Value>>>()?;
    let step = |line: &Value| Some((line["tokens_per_second"].as_f64()?, line["tokens"].as_f64()?));
    let mut steps: Vec<(f64, f64)> = lines.iter().filter_map(step).skip(1).collect();
    ensure!(!steps.is_empty(), "{} has no steps", out.display());
    steps.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (rate, tokens) = steps[steps.len() / 2];
    Ok(Speed { rate, tokens, step: tokens / rate })
}

fn opening(bench: &Bench, one: &Speed) -> Result<String> {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("unknown").to_owned();
    let cores = std::thread::available_parallelism()?.get();
    Ok(format!(
        "# Several processes\n\nMade by `cargo xtask bench --processes`; {}, {cores} cores, libtorch {}. The load of the machine at the end of the first table was {load}: above \
         the number of cores it had other work, and the figures are worse than they would be without.\n\n\
         ## What a second process gains\n\nA llama of 8 blocks, hidden 512, feed-forward 1408, random weights; r = 16 on every linear layer ({} numbers); a step is {ROWS} \
         rows, about {:.0} tokens, in {MICRO} micro-batches. Medians of {} steps.\n\n",
        doctor::cpu_model(),
        setup::VERSION,
        own_numbers(),
        one.tokens,
        bench.steps - 1,
    ))
}

/// Numbers that the timed run exchanges.
fn own_numbers() -> u64 {
    adapter_numbers(16, [8, 512, 512, 1408])
}

fn exchanges(bench: &Bench, text: &mut String) -> Result<()> {
    let numbers = SHAPES.map(|(_, r, shape)| adapter_numbers(r, shape));
    writeln!(
        text,
        "\n## What an exchange takes\n\nTwo ranks of this machine, over its loopback: the sum of a flat buffer of float32, as of the gradients of a LoRA of \
         rank 16 on every linear layer; and the same buffer to the other rank and back by send and receive.\n\n\
         | adapter of | numbers | bytes | sum | MB/s | there and back |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )?;
    for ((name, _, _), (numbers, [sum, back])) in SHAPES.iter().zip(numbers.iter().zip(bench.exchange(&numbers, None)?))
    {
        let megabytes = 4.0 * *numbers as f64 / 1e6;
        writeln!(
            text,
            "| {name} | {:.1} M | {megabytes:.0} MB | {sum:.3} s | {:.0} | {back:.3} s |",
            *numbers as f64 / 1e6,
            megabytes / sum
        )?;
    }
    Ok(())
}

fn links(bench: &Bench, rates: &[u32], one: &Speed, text: &mut String) -> Result<()> {
    writeln!(text, "\n## Where data parallel training stops paying\n")?;
    let mut rows = Vec::new();
    for &rate in rates {
        let link = match Link::new(rate) {
            Ok(link) => link,
            Err(why) => {
                writeln!(text, "Not measured: a link of {rate} Mbit/s could not be made here: {why:#}.")?;
                return Ok(());
            }
        };
        let [sum, _] =
            bench.exchange(&[own_numbers()], Some(&link))?.first().copied().context("nothing was printed")?;
        rows.push((rate, sum, bench.together(Some(&link))?));
    }
    writeln!(
        text,
        "The two ranks of the first table in two namespaces of the network, with a cable between them whose rate `tc` bounds at both ends (tbf). One rank of one thread does a \
         step in {:.2} s, so a second one pays where the exchange of {:.1} MB takes less than half of that.\n\n\
         | Mbit/s | exchange | tokens a second | to one rank |\n| ---: | ---: | ---: | ---: |",
        one.step,
        4.0 * own_numbers() as f64 / 1e6
    )?;
    for (rate, sum, speed) in &rows {
        let gain = speed.rate / one.rate;
        writeln!(text, "| {rate} | {sum:.3} s | {:.0} | {gain:.2} |", speed.rate)?;
    }
    // Two ranks pass 2 (N - 1) / N = 1 times the buffer, each, one way.
    let bits = 8.0 * 4.0 * own_numbers() as f64;
    let even = bits / (one.step / 2.0) / 1e6;
    writeln!(
        text,
        "\nBy the arithmetic it is even at {even:.0} Mbit/s: {:.0} Mbit in {:.2} s. The rate grows with the numbers that are trained, and falls with the tokens of a step: \
         `gradient_accumulation_steps` twice as large halves it.",
        bits / 1e6,
        one.step / 2.0
    )?;
    Ok(())
}

const ADDRESSES: [&str; 2] = ["10.79.0.1", "10.79.0.2"];

/// Two namespaces of the network with a bounded cable between them, which go when it is dropped.
struct Link {
    rate: u32,
    names: [String; 2],
}

impl Link {
    fn new(rate: u32) -> Result<Self> {
        let tag = std::process::id();
        let link = Self { rate, names: [format!("bench-a{tag}"), format!("bench-b{tag}")] };
        let [a, b] = &link.names;
        let (left, right) = (format!("xa{}", tag % 100_000), format!("xb{}", tag % 100_000));
        for line in [
            format!("ip netns add {a}"),
            format!("ip netns add {b}"),
            format!("ip link add {left} type veth peer name {right}"),
            format!("ip link set {left} netns {a} name cable"),
            format!("ip link set {right} netns {b} name cable"),
        ] {
            shell(&line)?;
        }
        for (name, address) in link.names.iter().zip(ADDRESSES) {
            for line in [
                format!("ip -n {name} addr add {address}/24 dev cable"),
                format!("ip -n {name} link set cable up"),
                format!("ip -n {name} link set lo up"),
                format!("tc -n {name} qdisc add dev cable root tbf rate {rate}mbit burst 64kb latency 50ms"),
            ] {
                shell(&line)?;
            }
        }
        Ok(link)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = shell(&format!("ip netns del {name}"));
        }
    }
}

fn shell(line: &str) -> Result<()> {
    let words: Vec<&str> = line.split(' ').collect();
    let [program, rest @ ..] = words.as_slice() else { bail!("no program") };
    capture(Command::new(program).args(rest)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_have_the_numbers_of_their_layers() {
        // Llama 3 8B with rank 16 on every linear layer, as PEFT counts it.
        assert_eq!(adapter_numbers(16, [32, 4096, 1024, 14336]), 41_943_040);
        assert_eq!(adapter_numbers(16, [80, 8192, 1024, 28672]), 207_093_760);
    }

    #[test]
    fn the_median_step_leaves_the_first_out() {
        let dir = tempfile::tempdir().unwrap();
        let line = |rate: f64| format!("{{\"tokens_per_second\": {rate}, \"tokens\": 2048}}\n");
        let text = [1.0, 512.0, 1024.0, 2048.0].map(line).concat() + "{\"eval_loss\": 1}\n";
        fs::write(dir.path().join("metrics.jsonl"), text).unwrap();
        let speed = speed(dir.path()).unwrap();
        assert_eq!((speed.rate, speed.tokens, speed.step), (1024.0, 2048.0, 2.0));
    }
}
