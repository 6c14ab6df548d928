//! The command line: verbs and what each of them takes.

use crate::cmd;
use crate::load::ModelArgs;
use clap::{Parser, Subcommand};
use std::path::PathBuf;

/// The command line of `lora`.
#[derive(Debug, Parser)]
#[command(
    name = "lora",
    version,
    about = "LoRA fine-tuning: train, evaluate, generate, merge",
    after_help = "Exit codes: 0 done, 1 the run failed, 2 the command line, the configuration or the data is at fault."
)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Fine-tune a model on a dataset
    Train(cmd::train::Args),
    /// Fine-tune with several processes of this machine
    Launch(cmd::launch::Args),
    /// Loss, perplexity and accuracy on a dataset
    Eval(cmd::eval::Args),
    /// Continue prompts
    Generate(cmd::generate::Args),
    /// Talk with a model
    Chat(cmd::chat::Args),
    /// The labels of texts, by a classifier
    Classify(cmd::classify::Args),
    /// Logits of given tokens, from file to file
    Logits(cmd::logits::Args),
    /// Merge an adapter into its base model
    Merge(cmd::merge::Args),
    /// Make several adapters into one, or one into another rank
    Mix(cmd::mix::Args),
    /// What full fine-tuning changed, as an adapter
    Extract(cmd::extract::Args),
    /// Write a model or an adapter for other programs
    #[command(subcommand)]
    Export(cmd::export::Verb),
    /// Get a model or a dataset of the hub, as it is there now
    Fetch(cmd::fetch::Args),
    /// What an adapter, a checkpoint, a run or a safetensors file holds
    Inspect(cmd::inspect::Args),
    /// Give an adapter that another tool wrote the names that PEFT would have given it
    Repair(cmd::repair::Args),
    /// A page of a run, or of several laid over each other
    Report(cmd::report::Args),
    /// What a watch has trained: its versions, the one that counts, and what was not published
    Versions(cmd::versions::Args),
    /// Make an earlier version of a watch the one that counts
    Rollback(cmd::rollback::Args),
    /// What will be trained, token by token
    #[command(subcommand)]
    Data(cmd::data::Verb),
    /// Parameters, memory and steps of a run, before anything is loaded
    Plan(cmd::plan::Args),
    /// Measure speed and memory
    #[command(subcommand)]
    Bench(cmd::bench::Verb),
    /// Make a checkpoint with fresh random weights
    #[command(hide = true)]
    InitModel(cmd::init_model::Args),
    /// Train the example that comes with the program and show before and after
    Demo(cmd::demo::Args),
    /// What this machine has to offer
    Doctor(cmd::doctor::Args),
}

impl Verb {
    /// What the flags name that may lie on the hub: models, and adapters. Verbs with a configuration see to it themselves.
    pub(crate) fn of_hub(&mut self) -> (Vec<&mut PathBuf>, Vec<&mut PathBuf>) {
        fn both(args: &mut ModelArgs) -> (Vec<&mut PathBuf>, Vec<&mut PathBuf>) {
            (vec![&mut args.model], args.adapter.iter_mut().collect())
        }
        match self {
            Self::Eval(args) => both(&mut args.model),
            Self::Generate(args) => both(&mut args.model),
            Self::Chat(args) => both(&mut args.model),
            Self::Classify(args) => both(&mut args.model),
            Self::Logits(args) => both(&mut args.model),
            Self::Merge(args) => (vec![&mut args.model], args.adapter.iter_mut().collect()),
            Self::Mix(args) => (args.model.iter_mut().collect(), args.adapter.iter_mut().collect()),
            Self::Extract(args) => (vec![&mut args.model, &mut args.tuned], Vec::new()),
            Self::Repair(args) => (args.model.iter_mut().collect(), vec![&mut args.adapter]),
            Self::Export(verb) => verb.of_hub(),
            Self::Bench(verb) => (verb.model().into_iter().collect(), Vec::new()),
            Self::Train(_) | Self::Launch(_) | Self::Data(_) | Self::Plan(_) | Self::Fetch(_) => {
                (Vec::new(), Vec::new())
            }
            Self::Inspect(_) | Self::Report(_) | Self::InitModel(_) => (Vec::new(), Vec::new()),
            Self::Demo(_) | Self::Doctor(_) | Self::Versions(_) | Self::Rollback(_) => (Vec::new(), Vec::new()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_takes_what_the_manual_says() {
        for line in [
            "train run.toml --set train.learning_rate=1e-4 --set seed=1 --resume --dry-run",
            "train --model m --data d.jsonl --output o",
            "eval --model m --adapter a --data d --format text --json",
            "generate --model m --adapter a --prompt hi --max-new-tokens 3 --temperature 0.5 --top-p 0.9 --seed 1 --json",
            "generate --model m --prompts f.jsonl",
            "chat --model m --adapter a",
            "classify --model m --adapter a --text hi --text-pair ho --json",
            "classify --model m --texts f.jsonl --batch-size 4 --max-length 64",
            "logits --model m --adapter a --input i.safetensors --output o.safetensors",
            "merge --model m --adapter a --adapter b --output o --dtype bfloat16 --verify",
            "mix --adapter a --weight=0.7 --adapter b --weight -0.3 --type ties_svd --density 0.5 --rank 4 --majority-sign-method frequency --output o --json",
            "export gguf --model m --adapter a --adapter b --output f.gguf --type q4_k_m",
            "export gguf-lora --model m --adapter a --output f.gguf",
            "export ollama --model m --output d",
            "extract --model m --tuned t --rank 8 --output o",
            "fetch hf://a/b@v1 --json",
            "fetch hf://a/b/data/*.parquet --dataset",
            "fetch a/b --split test",
            "inspect p --json",
            "repair a --output o --model m --json",
            "repair a --dry-run",
            "report a",
            "report a b c --output f.html",
            "train c.toml --quiet --log-format json",
            "data preview c.toml --n 2",
            "data stats f.jsonl --model m",
            "plan c.toml --json",
            "bench exchange --numbers 1000,2000 --repeats 3 --json",
            "bench step --model m --batch 4 --seq 512 --r 16 --targets all-linear --checkpointing --steps 3 --json",
            "init-model --config c.json --output o --seed 1",
            "demo",
            "doctor",
        ] {
            let words = std::iter::once("lora").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for line in [
            "generate --model m",
            "generate --model m --prompt a --prompts b",
            "repair a",
            "report",
            "classify --model m",
            "classify --model m --texts f --text-pair a",
            "eval --data d",
            "bench step --model m",
            "train --rezume",
            "fetch",
            "fetch a/b --model --dataset",
        ] {
            let words = std::iter::once("lora").chain(line.split(' '));
            assert_eq!(Cli::try_parse_from(words).unwrap_err().exit_code(), 2, "{line}");
        }
    }
}
