//! `gpu-check`: a folder to carry to a machine that has a GPU and Python torch but need not have Rust.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cargo::{Workspace, capture, run as run_command};
use crate::setup;

/// Builds `lora` and the packages' tests, strips copies of them into `target/gpu-check` and puts the script beside them.
pub fn run(ws: &Workspace, packages: &[String]) -> Result<()> {
    setup::ensure(ws)?;
    let lora = ws.build_lora()?;
    let out = ws.target()?.join("gpu-check");
    let _ = fs::remove_dir_all(&out);
    fs::create_dir_all(out.join("tests"))?;
    strip(&lora, &out.join("lora"))?;
    for test in test_programs(ws, packages)? {
        let name = test.file_name().context("a test program has a name")?;
        strip(&test, &out.join("tests").join(name))?;
    }
    for (name, config) in [("1b", one_billion()), ("8b", eight_billion())] {
        let shape = out.join("shapes").join(name);
        fs::create_dir_all(&shape)?;
        fs::write(shape.join("config.json"), config.to_string())?;
    }
    copy_folder(&ws.root.join("demo"), &out.join("demo"))?;
    fs::copy(ws.root.join("tests/reference/peft_bench.py"), out.join("peft_bench.py"))?;
    fs::write(out.join("gpu_check.sh"), include_str!("gpu_check.sh"))?;
    println!("{}: run `bash gpu_check.sh` there", out.display());
    Ok(())
}

/// The sizes of Llama 3.2 1B.
fn one_billion() -> Value {
    llama(&json!({
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": true,
    }))
}

/// The sizes of Llama 3 8B.
fn eight_billion() -> Value {
    llama(&json!({
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": false,
    }))
}

/// The configuration of a Llama with these sizes.
fn llama(sizes: &Value) -> Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128_256, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "max_position_embeddings": 8192, "initializer_range": 0.02,
        "bos_token_id": 128_000, "eos_token_id": 128_001, "attention_bias": false, "mlp_bias": false, "dtype": "bfloat16",
    });
    for (key, value) in sizes.as_object().into_iter().flatten() {
        config[key] = value.clone();
    }
    config
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
        if path.is_dir() {
            copy_folder(&path, &to.join(name))?;
        } else {
            fs::copy(&path, to.join(name)).with_context(|| format!("cannot copy {}", path.display()))?;
        }
    }
    Ok(())
}

/// Builds the tests of the packages and returns the programs.
fn test_programs(ws: &Workspace, packages: &[String]) -> Result<Vec<PathBuf>> {
    let mut build = ws.cargo();
    // All of the workspace: a package by itself would be built with other features, and everything below it anew.
    build.args(["test", "--release", "--workspace", "--no-run", "--message-format", "json"]);
    let text = capture(&mut build)?;
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let programs: Vec<_> = messages
        .filter(|m| m["profile"]["test"] == true)
        .filter(|m| {
            packages
                .iter()
                .any(|package| m["package_id"].as_str().is_some_and(|id| id.contains(&format!("/{package}#"))))
        })
        .filter_map(|m| m["executable"].as_str().map(PathBuf::from))
        .collect();
    ensure!(!programs.is_empty(), "{} have no test programs", packages.join(", "));
    Ok(programs)
}

/// Copies a program without its symbols.
pub fn strip(from: &Path, to: &Path) -> Result<()> {
    run_command(Command::new("strip").arg("-o").arg(to).arg(from))
}
