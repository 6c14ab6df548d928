//! `bench`: runs the criterion benchmarks and writes down what they measured, with the machine they ran on.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cargo::{Workspace, capture, first_line, shown};
use crate::{doctor, setup};

/// One run of the benchmarks.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    pub date: String,
    pub revision: String,
    /// Whether the working tree differed from the revision.
    pub dirty: bool,
    pub host: Host,
    pub libtorch: String,
    pub rustc: String,
    pub results: Vec<Row>,
    pub metrics: Vec<Metric>,
}

/// What two runs must share to be compared.
#[derive(Debug, Serialize, Deserialize, PartialEq)]
pub struct Host {
    pub cpu: String,
    pub cores: usize,
    pub memory_gib: u64,
    pub gpu: Option<String>,
}

impl Host {
    /// This machine.
    pub fn read() -> Result<Self> {
        Ok(Self {
            cpu: doctor::cpu_model(),
            cores: std::thread::available_parallelism()?.get(),
            memory_gib: doctor::memory_gib().unwrap_or_default().round() as u64,
            gpu: first_line("nvidia-smi", &["--query-gpu=name", "--format=csv,noheader"]),
        })
    }
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { cpu, cores, memory_gib, gpu } = self;
        write!(f, "{cpu}, {cores} cores, {memory_gib} GiB")?;
        gpu.as_ref().map_or(Ok(()), |gpu| write!(f, "; {gpu}"))
    }
}

/// One benchmark; times are nanoseconds per iteration.
#[derive(Debug, Serialize, Deserialize, PartialEq)]
pub struct Row {
    pub id: String,
    pub median_ns: f64,
    /// Median absolute deviation: the spread between samples.
    pub mad_ns: f64,
    /// Bounds of the median's 95 % confidence interval.
    pub low_ns: f64,
    pub high_ns: f64,
    pub throughput: Option<Throughput>,
}

/// What one iteration works through.
#[derive(Debug, Serialize, Deserialize, PartialEq)]
pub struct Throughput {
    pub per_iteration: f64,
    pub unit: String,
}

/// A line `METRIC name value unit` that a benchmark printed.
#[derive(Debug, Serialize, Deserialize, PartialEq)]
pub struct Metric {
    pub name: String,
    pub value: f64,
    pub unit: String,
}

impl Metric {
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<_> = line.strip_prefix("METRIC ")?.split_whitespace().collect();
        let [name, value, unit] = words[..] else { return None };
        Some(Self { name: name.to_owned(), value: value.parse().ok()?, unit: unit.to_owned() })
    }
}

/// Runs every benchmark target of the workspace.
pub fn run(ws: &Workspace, report: bool, filter: Option<&str>) -> Result<()> {
    setup::ensure(ws)?;
    let metadata = ws.metadata(&["--no-deps"])?;
    let target = metadata["target_directory"].as_str().context("cargo metadata names no target_directory")?;
    let started = SystemTime::now();
    let mut metrics = Vec::new();
    let mut any = false;
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let targets = package["targets"].as_array().into_iter().flatten();
        for bench in targets.filter(|t| t["kind"][0] == "bench").filter_map(|t| t["name"].as_str()) {
            any = true;
            let mut command = ws.cargo();
            // Of the whole workspace: one package alone would be built with other features, anew.
            command.args(["bench", "--workspace", "--bench", bench, "--"]).args(filter);
            metrics.append(&mut tee(&mut command)?);
        }
    }
    ensure!(any, "no crate of the workspace has a benchmark target");
    if !report {
        return Ok(());
    }
    let results = collect(&Path::new(target).join("criterion"), started)?;
    ensure!(!results.is_empty() || !metrics.is_empty(), "no benchmark ran: does the filter match any?");
    write(ws, &describe(ws, results, metrics)?)
}

/// Shows what the command prints and keeps its METRIC lines.
fn tee(command: &mut Command) -> Result<Vec<Metric>> {
    let mut child =
        command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start `{}`", shown(command)))?;
    let mut metrics = Vec::new();
    for line in BufReader::new(child.stdout.take().context("stdout was asked for")?).lines() {
        let line = line?;
        println!("{line}");
        metrics.extend(Metric::parse(&line));
    }
    let status = child.wait()?;
    ensure!(status.success(), "`{}` failed ({status})", shown(command));
    Ok(metrics)
}

/// Reads what criterion left below `folder` since `started`, sorted by id.
pub fn collect(folder: &Path, started: SystemTime) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(folder) = open.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for path in entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()) {
            let estimates = path.join("estimates.json");
            let fresh = fs::metadata(&estimates).and_then(|m| m.modified()).is_ok_and(|time| time >= started);
            match path.file_name().is_some_and(|name| name == "new") {
                true if fresh => {
                    rows.push(read_row(&read_json(&path.join("benchmark.json"))?, &read_json(&estimates)?)?)
                }
                true => {}
                false => open.push(path),
            }
        }
    }
    rows.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(rows)
}

fn read_json(path: &PathBuf) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))
}

fn read_row(benchmark: &Value, estimates: &Value) -> Result<Row> {
    let id = benchmark["full_id"].as_str().context("criterion's benchmark.json has no full_id")?.to_owned();
    let number = |value: &Value| value.as_f64().with_context(|| format!("criterion's estimates.json of {id} has gaps"));
    let median = &estimates["median"];
    // Null, {"Elements": n} or {"Bytes": n}.
    let throughput = benchmark["throughput"].as_object().and_then(|map| map.iter().next());
    Ok(Row {
        median_ns: number(&median["point_estimate"])?,
        mad_ns: number(&estimates["median_abs_dev"]["point_estimate"])?,
        low_ns: number(&median["confidence_interval"]["lower_bound"])?,
        high_ns: number(&median["confidence_interval"]["upper_bound"])?,
        throughput: match throughput {
            Some((unit, n)) => Some(Throughput { per_iteration: number(n)?, unit: unit.to_lowercase() }),
            None => None,
        },
        id,
    })
}

fn describe(ws: &Workspace, results: Vec<Row>, metrics: Vec<Metric>) -> Result<Report> {
    let git = |args: &[&str]| capture(Command::new("git").arg("--no-optional-locks").args(args).current_dir(&ws.root));
    let revision =
        git(&["rev-parse", "--short=12", "HEAD"]).map_or("unknown".to_owned(), |text| text.trim().to_owned());
    Ok(Report {
        date: capture(Command::new("date").args(["-u", "+%Y-%m-%d"]))?.trim().to_owned(),
        dirty: git(&["status", "--porcelain"]).map_or(true, |text| !text.trim().is_empty()),
        revision,
        host: Host::read()?,
        libtorch: setup::VERSION.to_owned(),
        rustc: first_line("rustc", &["--version"]).unwrap_or_default(),
        results,
        metrics,
    })
}

fn write(ws: &Workspace, report: &Report) -> Result<()> {
    let folder = ws.root.join("docs/benchmarks");
    fs::create_dir_all(&folder)?;
    let name = format!("{}-{}.json", report.date, report.revision);
    let mut text = serde_json::to_string_pretty(report)?;
    text.push('\n');
    fs::write(folder.join(&name), text)?;
    fs::write(folder.join("README.md"), page(report, &name))?;
    println!("docs/benchmarks/{name}: {} benchmarks", report.results.len());
    Ok(())
}

/// The newest run as a page.
fn page(report: &Report, name: &str) -> String {
    let mut text = format!(
        "# Benchmarks\n\nThe newest run, written by `cargo xtask bench --report`; all its figures are in [{name}]({name}). \
         `cargo xtask bench --compare A B` lays two runs of one machine side by side.\n\n\
         Revision {}{}, {}; {}; libtorch {}; {}.\n",
        report.revision,
        if report.dirty { " with changes" } else { "" },
        report.date,
        report.host,
        report.libtorch,
        report.rustc,
    );
    if !report.results.is_empty() {
        text.push_str("\n| benchmark | median | spread | rate |\n| --- | ---: | ---: | ---: |\n");
    }
    for row in &report.results {
        let rate = row
            .throughput
            .as_ref()
            .map_or(String::new(), |t| format!("{} {}/s", short(t.per_iteration / (row.median_ns / 1e9)), t.unit));
        let spread = 100.0 * row.mad_ns / row.median_ns;
        text.push_str(&format!("| {} | {} | ±{spread:.1} % | {rate} |\n", row.id, time(row.median_ns)));
    }
    if !report.metrics.is_empty() {
        text.push_str("\n| measure | value |\n| --- | ---: |\n");
    }
    for metric in &report.metrics {
        text.push_str(&format!("| {} | {} {} |\n", metric.name, metric.value, metric.unit));
    }
    text
}

/// Nanoseconds in a readable unit.
pub fn time(ns: f64) -> String {
    match ns {
        ns if ns < 1e3 => format!("{ns:.1} ns"),
        ns if ns < 1e6 => format!("{:.2} µs", ns / 1e3),
        ns if ns < 1e9 => format!("{:.2} ms", ns / 1e6),
        ns => format!("{:.3} s", ns / 1e9),
    }
}

fn short(n: f64) -> String {
    match n {
        n if n < 1e3 => format!("{n:.1}"),
        n if n < 1e6 => format!("{:.1} k", n / 1e3),
        n if n < 1e9 => format!("{:.1} M", n / 1e6),
        n => format!("{:.2} G", n / 1e9),
    }
}

/// Reads a report.
pub fn read(path: &Path) -> Result<Report> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let Ok(report) = serde_json::from_str(&text) else {
        bail!("{} is no report of `cargo xtask bench --report`", path.display());
    };
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leave(folder: &Path, id: &str, median: f64, throughput: &str) {
        let new = folder.join(id).join("new");
        fs::create_dir_all(&new).unwrap();
        let benchmark = format!(r#"{{"group_id":"g","full_id":"{id}","throughput":{throughput}}}"#);
        fs::write(new.join("benchmark.json"), benchmark).unwrap();
        let estimates = format!(
            r#"{{"median":{{"confidence_interval":{{"lower_bound":1.0,"upper_bound":9.0}},"point_estimate":{median}}},
                "median_abs_dev":{{"point_estimate":0.5}}}}"#
        );
        fs::write(new.join("estimates.json"), estimates).unwrap();
    }

    #[test]
    fn criterion_files_are_read_and_stale_ones_are_not() {
        let dir = tempfile::tempdir().unwrap();
        leave(dir.path(), "norm/4x512", 2000.0, r#"{"Elements":2048}"#);
        leave(dir.path(), "loss", 5.0, "null");
        let rows = collect(dir.path(), SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(rows.iter().map(|row| row.id.as_str()).collect::<Vec<_>>(), ["loss", "norm/4x512"]);
        assert_eq!(rows[0].throughput, None);
        assert_eq!(rows[1].throughput, Some(Throughput { per_iteration: 2048.0, unit: "elements".to_owned() }));
        assert_eq!((rows[1].median_ns, rows[1].mad_ns, rows[1].low_ns, rows[1].high_ns), (2000.0, 0.5, 1.0, 9.0));
        let later = SystemTime::now() + std::time::Duration::from_secs(60);
        assert_eq!(collect(dir.path(), later).unwrap(), []);
    }

    #[test]
    fn a_damaged_estimate_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        leave(dir.path(), "loss", 5.0, "null");
        fs::write(dir.path().join("loss/new/estimates.json"), r#"{"median":{}}"#).unwrap();
        let error = collect(dir.path(), SystemTime::UNIX_EPOCH).unwrap_err();
        assert!(error.to_string().contains("loss"), "{error}");
    }

    #[test]
    fn metric_lines() {
        let metric = Metric { name: "step/tokens".to_owned(), value: 1234.5, unit: "tok/s".to_owned() };
        assert_eq!(Metric::parse("METRIC step/tokens 1234.5 tok/s"), Some(metric));
        for line in ["METRIC a b c", "METRIC a 1", "a METRIC b 1 s", ""] {
            assert_eq!(Metric::parse(line), None, "{line}");
        }
    }
}
