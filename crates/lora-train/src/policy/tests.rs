#![allow(clippy::print_stderr)] // rows of a table in the guide, with --nocapture

use super::*;
use crate::golden::{GRADIENT_TOLERANCE, folder, json, model, near};
use crate::policy_loss::PolicyAverage;
use lora_format::{TensorFile, read_adapter};
use tch::Kind;

/// Both answers of every pair, a group each, with what is given of them.
fn given(file: &TensorFile) -> Vec<OneAnswer> {
    let read = |name: &str| to_host(&file.read(name).unwrap()).unwrap();
    let rewards = read("grpo.rewards");
    let advantages = advantages(&rewards, 2, crate::policy_loss::ScaleRewards::Group);
    for (got, wanted) in advantages.iter().zip(read("grpo.advantages")) {
        assert!(near(*got, wanted), "advantage {got} against {wanted}");
    }
    let (mut old, mut reference) = (read("grpo.old").into_iter(), read("grpo.reference").into_iter());
    let mut list = Vec::new();
    for pair in json("pairs.json") {
        let ids = |name: &str| -> Vec<i64> { serde_json::from_value(pair[name].clone()).unwrap() };
        for side in ["chosen", "rejected"] {
            let new = ids(side).len();
            list.push(OneAnswer {
                input_ids: [ids("prompt"), ids(side)].concat(),
                prompt: ids("prompt").len(),
                ended: true,
                reward: rewards[list.len()],
                advantage: advantages[list.len()],
                old: old.by_ref().take(new).collect(),
                reference: reference.by_ref().take(new).collect(),
                ..OneAnswer::default()
            });
        }
    }
    assert!(old.next().is_none() && reference.next().is_none());
    list
}

#[test]
fn losses_and_gradients_are_those_of_trl() {
    let mut model = model();
    model.load_adapter(&read_adapter(&folder().join("adapters/lora")).unwrap()).unwrap();
    let file = TensorFile::open(&folder().join("preference/reference.safetensors")).unwrap();
    let mut seen = 0;
    for case in json("cases.json").iter().filter(|case| case["name"].as_str().unwrap().starts_with("grpo")) {
        seen += 1;
        let (name, hyper) = (case["name"].as_str().unwrap(), &case["hyperparameters"]);
        let number = |key: &str| hyper[key].as_f64().unwrap();
        let is_first = hyper["old"] == false;
        let beta = number("beta");
        let config = ObjectiveConfig {
            policy_average: *PolicyAverage::ALL.iter().find(|a| hyper["average"] == a.name()).unwrap(),
            name: crate::config::ObjectiveName::Grpo,
            beta: Some(beta),
            epsilon: number("low"),
            epsilon_high: Some(number("high")),
            num_generations: 2,
            num_iterations: if is_first { 1 } else { 2 },
            max_completion_length: number("max_completion_length") as u32,
            ..ObjectiveConfig::default()
        };
        let mut list = given(&file);
        for answer in &mut list {
            if is_first {
                answer.old.clear();
            }
            if beta == 0.0 {
                answer.reference.clear();
            }
        }
        // In one micro-batch, and in two.
        let (one, two) = (vec![list.clone()], list.chunks(4).map(<[OneAnswer]>::to_vec).collect());
        for (batches, checkpointing) in [(one, false), (two, true)] {
            let micro_batches = batches.len();
            let mut policy = Policy {
                reward: Box::new(|_: &[Completion<'_>]| Vec::new()),
                loss: config.policy_loss(),
                config: config.clone(),
                reference: (beta > 0.0).then(|| Tensor::from(0.0)),
                answered: Some(Answered { batches, uses: 0 }),
                judged: PolicyJudgement::default(),
            };
            let parameters = model.parameters();
            parameters.iter().for_each(|p| lora_torch::set_grad(&p.tensor, &p.tensor.zeros_like()).unwrap());
            let part = |micro| policy.backward(&model, micro, 0, checkpointing.into()).unwrap();
            let loss: f64 = (0..micro_batches).map(part).sum();
            let wanted = case["loss"].as_f64().unwrap();
            assert!(near(loss, wanted), "{name}: loss {loss} against {wanted}");
            let mut furthest = 0.0f64;
            for p in &parameters {
                let wanted = file.read(&format!("{name}.grad.base_model.model.{}", p.name)).unwrap();
                let largest = wanted.abs().max().double_value(&[]).max(1e-3);
                let error = (p.tensor.grad().to_kind(Kind::Double) - wanted.to_kind(Kind::Double)).abs().max();
                let error = error.double_value(&[]) / largest;
                assert!(error < GRADIENT_TOLERANCE, "{name}: {} differs by {error} of its largest", p.name);
                furthest = furthest.max(error);
            }
            // A row of the table in the guide, with `--nocapture`.
            eprintln!("| `{name}` | {wanted:.9} | {:.1e} | {furthest:.1e} |", (loss - wanted).abs());
            let figures = policy.figures();
            let metric = |key: &str| case["metrics"][key].as_f64();
            if let (Some(wanted), Some(got)) = (metric("kl"), figures.kl) {
                assert!(near(got, wanted), "{name}: kl {got} against {wanted}");
            }
            if let (Some(wanted), Some(got)) = (metric("clip_ratio/region_mean"), figures.clipped) {
                assert!(
                    (got - wanted).abs() < f64::from(f32::EPSILON),
                    "{name}: clipped {got} against {wanted}, a float"
                );
            }
            assert_eq!(figures.kl.is_some(), beta > 0.0, "{name}");
        }
    }
    assert_eq!(seen, 4, "every case of TRL");
}
