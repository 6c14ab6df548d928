//! `demo-base`: makes the folder `demo`, that is the small base model, its vocabulary, and the data to fine-tune it on.

mod bpe;
mod files;
mod place;
mod prose;
mod record;
mod rng;
mod weights;
mod words;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::cargo::{self, Workspace};
use crate::setup;

/// The configuration of the pre-training, below the root; its paths are below the root too.
const PRETRAIN: &str = "demo/pretrain.toml";
const CORPUS: &str = "target/demo/corpus.jsonl";
const FRESH: &str = "target/demo/fresh";
const RUN: &str = "target/demo/pretrain";
/// The seed of the fresh weights.
const SEED: &str = "1";

/// Writes the data and the vocabulary and, unless `data_only`, trains the base model anew.
pub fn run(ws: &Workspace, data_only: bool) -> Result<()> {
    let corpus = files::corpus();
    let files = files::files(&corpus)?;
    let demo = ws.root.join("demo");
    if data_only {
        write(&demo, &files)?;
        println!("wrote {} files to {}", files.len(), demo.display());
        return Ok(());
    }
    setup::ensure(ws)?;
    let lora = ws.build_lora()?;
    let stage = ws.root.join("target/demo/stage");
    for folder in [&stage, &ws.root.join(FRESH), &ws.root.join(RUN)] {
        if folder.exists() {
            fs::remove_dir_all(folder).with_context(|| format!("cannot empty {}", folder.display()))?;
        }
    }
    write(&stage, &files)?;
    write(&ws.root, &BTreeMap::from([(CORPUS.to_owned(), files::corpus_file(&corpus)?)]))?;
    let run = |args: &[&str]| cargo::run(Command::new(&lora).current_dir(&ws.root).args(args));
    run(&["init-model", "--config", "target/demo/stage/base/config.json", "--output", FRESH, "--seed", SEED])?;
    run(&["train", PRETRAIN])?;

    let trained = ws.root.join(RUN).join("model.safetensors");
    let trained = fs::read(&trained).with_context(|| format!("cannot read {}", trained.display()))?;
    write(&demo, &files)?;
    write(&demo, &BTreeMap::from([(WEIGHTS.to_owned(), weights::to_bfloat16(&trained)?)]))?;
    println!("wrote {} files to {}", files.len() + 1, demo.display());
    Ok(())
}

const WEIGHTS: &str = "base/model.safetensors";

fn write(folder: &Path, files: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    for (name, bytes) in files {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().context("a file lies in a folder")?)?;
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
