//! One file for each verb.

pub(crate) mod bench;
pub(crate) mod bench_data;
pub(crate) mod bench_exchange;
pub(crate) mod chat;
pub(crate) mod classify;
pub(crate) mod data;
pub(crate) mod data_cache;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod extract;
pub(crate) mod fetch;
pub(crate) mod generate;
pub(crate) mod init_model;
pub(crate) mod inspect;
pub(crate) mod launch;
pub(crate) mod logits;
pub(crate) mod merge;
pub(crate) mod mix;
pub(crate) mod plan;
pub(crate) mod repair;
pub(crate) mod report;
pub(crate) mod rollback;
pub(crate) mod train;
pub(crate) mod versions;
pub(crate) mod watch;

use crate::cli::Verb;
use crate::fetching;
use anyhow::Result;

/// Runs a verb.
///
/// # Errors
/// What the verb reports.
pub(crate) fn run(mut verb: Verb) -> Result<()> {
    let (models, adapters) = verb.of_hub();
    fetching::resolve(models, adapters)?;
    match verb {
        Verb::Train(args) => train::run(&args),
        Verb::Launch(args) => launch::run(&args),
        Verb::Eval(args) => eval::run(&args),
        Verb::Generate(args) => generate::run(&args),
        Verb::Chat(args) => chat::run(&args),
        Verb::Classify(args) => classify::run(&args),
        Verb::Logits(args) => logits::run(&args),
        Verb::Merge(args) => merge::run(&args),
        Verb::Mix(args) => mix::run(&args),
        Verb::Export(verb) => export::run(&verb),
        Verb::Extract(args) => extract::run(&args),
        Verb::Fetch(args) => fetch::run(&args),
        Verb::Inspect(args) => inspect::run(&args),
        Verb::Repair(args) => repair::run(&args),
        Verb::Report(args) => report::run(&args),
        Verb::Versions(args) => versions::run(&args),
        Verb::Rollback(args) => rollback::run(&args),
        Verb::Data(verb) => data::run(&verb),
        Verb::Plan(args) => plan::run(&args),
        Verb::Bench(verb) => bench::run(&verb),
        Verb::InitModel(args) => init_model::run(&args),
        Verb::Demo(args) => demo::run(&args),
        Verb::Doctor(args) => doctor::run(&args),
    }
}
