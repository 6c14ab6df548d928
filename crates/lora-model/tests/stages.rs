//! A model in two parts, one after the other in one process, against the whole of it.
#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

mod common;

use lora_format::{AdapterConfig, TargetModules};
use lora_model::{Decoder, Error, Keeping, Mode, ModelConfig, Stage, Storage, TokenBatch, all_linear, plan_injection};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// bfloat16 keeps 8 significant bits, so rounding to the nearest moves a number by at most 2^-9 of itself.
const BF16_ROUNDING: f64 = 1.0 / 512.0;
/// What the bound leaves out of account: terms of second order of changes of a hundredth.
const SECOND_ORDER: f64 = 0.1;

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(family)
}

fn load(family: &str, stage: Stage, lora: &AdapterConfig, storage: Storage) -> Decoder {
    let dir = fixture(family);
    let config = ModelConfig::read(&dir).unwrap();
    let keeping = Keeping { kind: Kind::Float, device: Device::Cpu, storage };
    let mut seen = (0, 0);
    let mut model = Decoder::load_stage(&dir, config, stage, 0, keeping, &mut |done, all| seen = (done, all)).unwrap();
    assert!(seen.1 > 0 && seen.0 <= seen.1, "{seen:?}");
    let plan = plan_injection(&model.config, lora).unwrap();
    model.inject(&plan, 11).unwrap();
    model.lora_dropout = 0.2;
    // B begins at zero, where no gradient would reach A.
    for parameter in model.parameters() {
        if parameter.name.contains("lora_B") {
            let noise = Tensor::arange(parameter.tensor.numel() as i64, (Kind::Float, Device::Cpu)).sin() * 0.05;
            tch::no_grad(|| parameter.tensor.shallow_clone().copy_(&noise.view(parameter.tensor.size().as_slice())));
        }
    }
    model
}

fn batch(config: &ModelConfig) -> TokenBatch {
    let ids: Vec<i64> = (0..21).map(|i| (3 + i * 11) % config.vocab_size).collect();
    let rows = [1, 2, 3, 7, 8, 15, 16, 19];
    let targets: Vec<i64> = rows.iter().map(|row| (5 + row * 3) % config.vocab_size).collect();
    TokenBatch::new(config, &ids, &[5, 12, 4], &rows, &targets, Device::Cpu).unwrap()
}

fn gradients(models: &[Decoder]) -> BTreeMap<String, Tensor> {
    models.iter().flat_map(Decoder::parameters).map(|p| (p.name, p.tensor.grad().detach().copy())).collect()
}

/// One batch through both, with what goes between them as `between`.
fn two_stages(first: &Decoder, last: &Decoder, batch: &TokenBatch, checkpointing: bool, between: Kind) -> f64 {
    let as_sent = |t: &Tensor| t.detach().to_kind(between).to_kind(Kind::Float);
    let begun = first.forward_part(batch, None, 7, checkpointing).unwrap();
    let ended = last.forward_part(batch, Some(&as_sent(&begun.output)), 7, checkpointing).unwrap();
    let (loss, gradient) = last.loss_part(batch, &ended, 0.5).unwrap();
    let gradient = last.backward_part(batch, ended, &gradient).unwrap().unwrap();
    assert!(first.backward_part(batch, begun, &as_sent(&gradient)).unwrap().is_none());
    loss.double_value(&[])
}

#[test]
fn two_parts_have_the_bits_of_the_whole() {
    let gpt2 = AdapterConfig { fan_in_fan_out: true, ..all_linear(2, 4.0) };
    let with_table = AdapterConfig {
        target_modules: Some(TargetModules::List(["embed_tokens", "q_proj", "down_proj"].map(String::from).into())),
        ..all_linear(2, 4.0)
    };
    let dora = AdapterConfig { use_dora: true, ..all_linear(2, 4.0) };
    for (family, lora) in [
        ("llama", all_linear(2, 4.0)),
        ("llama", with_table),
        ("llama", dora),
        ("qwen2", all_linear(2, 4.0)),
        ("gemma2", all_linear(2, 4.0)),
        ("gpt2", gpt2),
        ("qwen3_moe", all_linear(2, 4.0)),
    ] {
        let config = ModelConfig::read(&fixture(family)).unwrap();
        let stages = Stage::split(&config, 2).unwrap();
        for (checkpointing, storage) in [(false, Storage::Converted), (true, Storage::Mapped)] {
            let whole = load(family, Stage::whole(&config), &lora, storage);
            let parts: Vec<_> = stages.iter().map(|s| load(family, s.clone(), &lora, storage)).collect();
            let batch = batch(&config);
            let wanted = whole.loss_and_backward(&batch, 7, 0.5, checkpointing).unwrap().double_value(&[]);
            let found = two_stages(&parts[0], &parts[1], &batch, checkpointing, Kind::Float);
            assert_eq!(found, wanted, "{family}, {checkpointing}");
            let (found, wanted) = (gradients(&parts), gradients(std::slice::from_ref(&whole)));
            assert!(found.keys().eq(wanted.keys()), "{family}");
            for (name, gradient) in &wanted {
                assert!(found[name].equal(gradient), "{family}: {name}, {checkpointing}");
            }
            assert!(wanted.values().any(|g| g.abs().max().double_value(&[]) > 0.0));

            let output = parts[0].output_part(&batch, None).unwrap();
            let output = parts[1].output_part(&batch, Some(&output)).unwrap();
            assert_eq!(parts[1].evaluate_output(&batch, &output).unwrap(), whole.evaluate(&batch).unwrap(), "{family}");
        }
    }
}

#[test]
fn a_part_holds_its_own_weights_and_refuses_what_takes_the_whole() {
    // Tied, so that the table is held at both ends.
    let config = ModelConfig::read(&fixture("gemma2")).unwrap();
    assert!(config.tie_word_embeddings);
    let whole = load("gemma2", Stage::whole(&config), &all_linear(2, 4.0), Storage::Converted);
    let stages = Stage::split(&config, 2).unwrap();
    let parts: Vec<_> =
        stages.iter().map(|s| load("gemma2", s.clone(), &all_linear(2, 4.0), Storage::Converted)).collect();
    let table = (config.vocab_size * config.hidden_size * 4) as usize;
    assert_eq!(parts.iter().map(Decoder::base_bytes).sum::<usize>(), whole.base_bytes() + table);
    assert!(parts.iter().all(|part| part.base_bytes() < whole.base_bytes()));
    let paths = |model: &Decoder| model.modules().into_iter().map(|(path, _)| path).collect::<Vec<_>>();
    assert_eq!([paths(&parts[0]), paths(&parts[1])].concat(), paths(&whole));
    let adapters = |model: &Decoder| model.adapter_modules().unwrap().into_keys().collect::<Vec<_>>();
    let mut both = [adapters(&parts[0]), adapters(&parts[1])].concat();
    both.sort();
    assert_eq!(both, adapters(&whole));

    let batch = batch(&config);
    let refused = |error: Error| assert!(matches!(error, Error::PartOfModel { .. }), "{error}");
    for part in &parts {
        refused(part.hidden(&batch, Mode::Eval, None).unwrap_err());
    }
    refused(parts[1].loss_and_backward(&batch, 7, 1.0, false).unwrap_err());
    refused(parts[0].loss_and_backward(&batch, 7, 1.0, false).unwrap_err());
    refused(parts[0].evaluate(&batch).unwrap_err());
}

#[test]
fn bfloat16_between_the_parts_moves_the_loss_by_no_more_than_its_rounding() {
    for family in ["llama", "gemma2"] {
        let config = ModelConfig::read(&fixture(family)).unwrap();
        let stages = Stage::split(&config, 2).unwrap();
        let load = || stages.iter().map(|s| load(family, s.clone(), &all_linear(2, 4.0), Storage::Converted));
        let (exact, rounded): (Vec<_>, Vec<_>) = (load().collect(), load().collect());
        let batch = batch(&config);
        let wanted = two_stages(&exact[0], &exact[1], &batch, false, Kind::Float);
        let found = two_stages(&rounded[0], &rounded[1], &batch, false, Kind::BFloat16);
        assert_ne!(found, wanted, "it is rounded");
        // Of a change d of what is between them, the loss changes by <g, d> to the first order, and |d| <= 2^-9 |x|.
        let begun = exact[0].forward_part(&batch, None, 7, false).unwrap();
        let ended = exact[1].forward_part(&batch, Some(&begun.output), 7, false).unwrap();
        let (_, gradient) = exact[1].loss_part(&batch, &ended, 1.0).unwrap();
        let gradient = exact[1].backward_part(&batch, ended, &gradient).unwrap().unwrap();
        let product = (gradient * begun.output.detach()).abs().sum(Kind::Double).double_value(&[]);
        let bound = BF16_ROUNDING * product * (1.0 + SECOND_ORDER);
        assert!((found - wanted).abs() <= bound, "{family}: {found} and not {wanted}, bound {bound}");
    }
}
