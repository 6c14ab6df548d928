//! Against TRL 1.16 in float64 (`tests/reference/make_preference.py`): the loss and every gradient of each objective on a
//! model with an adapter, its base being the reference.
#![allow(clippy::print_stderr)] // rows of a table in the guide, with --nocapture

use super::*;
use crate::events::NoEvents;
use crate::golden::{GRADIENT_TOLERANCE, folder, json, model, near};
use crate::objective::{Dpo, DpoLoss, Kto, Orpo, RewardModel, SimPo};
use lora_data::{Example, Origin};
use lora_format::{TensorFile, read_adapter};
use serde_json::Value;

fn example(record: &Value, answer: &str) -> Example {
    let ids = |key: &str| -> Vec<u32> {
        record[key].as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
    };
    let (prompt, answer) = (ids("prompt"), ids(answer));
    Example {
        trained: [vec![false; prompt.len()], vec![true; answer.len()]].concat(),
        input_ids: [prompt, answer].concat(),
        origin: Origin { file: Path::new("x").into(), record: 0, line: 1 },
    }
}

fn pairs() -> Answers {
    let pair = |r: &Value| [example(r, "chosen"), example(r, "rejected")];
    Answers::of_pairs(json("pairs.json").iter().flat_map(pair).collect::<Vec<_>>().into())
}

/// The rated answers of a case, which may be some of them.
fn rated(case: &Value) -> Answers {
    let all = json("rated.json");
    let rows: Vec<usize> = match case["hyperparameters"]["rows"].as_array() {
        None => (0..all.len()).collect(),
        Some(rows) => rows.iter().map(|row| usize::try_from(row.as_u64().unwrap()).unwrap()).collect(),
    };
    let good = rows.iter().map(|&row| all[row]["label"].as_bool().unwrap()).collect();
    let rows: Vec<Example> = rows.into_iter().map(|row| example(&all[row], "completion")).collect();
    Answers::of_rated(rows.into(), good, 64).unwrap()
}

/// The objective of a case; `None` where there is none on purpose.
fn objective(case: &Value) -> Option<Box<dyn Objective>> {
    let number = |key: &str| case["hyperparameters"][key].as_f64();
    let beta = number("beta").unwrap_or(f64::NAN);
    let dpo = |loss| -> Option<Box<dyn Objective>> {
        Some(Box::new(Dpo { loss, beta, label_smoothing: number("label_smoothing").unwrap_or(0.0), rpo_alpha: 0.0 }))
    };
    let kto = |drift| -> Option<Box<dyn Objective>> {
        let weight = |key| number(key).unwrap();
        let (desirable_weight, undesirable_weight) = (weight("desirable_weight"), weight("undesirable_weight"));
        Some(Box::new(Kto { beta, desirable_weight, undesirable_weight, drift }))
    };
    match case["name"].as_str().unwrap() {
        "dpo_sigmoid" | "dpo_smooth" => dpo(DpoLoss::Sigmoid),
        "dpo_hinge" | "dpo_hinge_flat" => dpo(DpoLoss::Hinge),
        "dpo_ipo" => dpo(DpoLoss::Ipo),
        "dpo_sigmoid_norm" => dpo(DpoLoss::SigmoidNorm),
        "dpo_robust" => dpo(DpoLoss::Robust),
        "dpo_apo_zero" => dpo(DpoLoss::ApoZero),
        "dpo_apo_down" => dpo(DpoLoss::ApoDown),
        "orpo" => Some(Box::new(Orpo { beta })),
        "simpo" => Some(Box::new(SimPo { beta, gamma: number("gamma").unwrap() })),
        "kto" | "kto_clamped" => kto(true),
        "kto_apo" => kto(false),
        // TRL's ORPO learns the prompts, too, and weighs pairs by their length; ours is the paper's.
        "orpo_trl" => None,
        // Of given scores, below.
        "reward" | "reward_centered" => None,
        // In policy/tests.rs.
        grpo if grpo.starts_with("grpo") => None,
        other => panic!("no objective for {other}"),
    }
}

#[test]
fn losses_and_gradients_are_those_of_trl() {
    let base = model();
    let mut policy = model();
    policy.load_adapter(&read_adapter(&folder().join("adapters/lora")).unwrap()).unwrap();
    let file = TensorFile::open(&folder().join("preference/reference.safetensors")).unwrap();
    let mut seen = 0;
    for case in json("cases.json") {
        let name = case["name"].as_str().unwrap();
        let Some(objective) = objective(&case) else { continue };
        seen += 1;
        let answers = if name.starts_with("kto") { rated(&case) } else { pairs() };
        let examples: Vec<usize> = (0..answers.rows.len()).collect();
        let laid = Laid { batch: answers.rows.batch(examples.iter().copied()).unwrap(), examples };
        let dir = tempfile::tempdir().unwrap();
        let mut comparing = Comparing::new(objective, answers.clone(), answers.clone());
        if comparing.needs_reference() {
            comparing.ask_reference(&base, "base", 3, (dir.path(), true), &mut NoEvents).unwrap();
        }
        let count = comparing.count(std::slice::from_ref(&laid)) as f64;

        for checkpointing in [false, true] {
            let parameters = policy.parameters();
            parameters.iter().for_each(|p| lora_torch::set_grad(&p.tensor, &p.tensor.zeros_like()).unwrap());
            let tally = comparing.backward(&policy, &laid, 0, 1.0 / count, checkpointing.into()).unwrap();
            let (loss, wanted) = (tally.loss / count, case["loss"].as_f64().unwrap());
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
            let rewards = tally.rewards();
            for (key, got) in [
                ("rewards/chosen", rewards.chosen),
                ("rewards/rejected", rewards.rejected),
                ("rewards/margins", rewards.margin),
                ("rewards/accuracies", rewards.accuracy),
                ("kl", rewards.drift),
            ] {
                if let (Some(wanted), Some(got)) = (case["metrics"][key].as_f64(), got) {
                    assert!(near(got, wanted), "{name}: {key} {got} against {wanted}");
                }
            }
        }
        // Evaluated in one go it is the same.
        let report = comparing.evaluate(&policy, count as usize, &mut NoEvents).unwrap();
        assert!(near(report.loss, case["loss"].as_f64().unwrap()), "{name}: evaluated {}", report.loss);
        // What the reference said is found again, and not what belongs to another run.
        let mut again = Comparing::new(self::objective(&case).unwrap(), answers.clone(), answers);
        let path = dir.path().join(REFERENCE_FILE);
        if comparing.needs_reference() {
            again.ask_reference(&policy, "base", 3, (dir.path(), true), &mut NoEvents).unwrap();
            assert_eq!(again.known, comparing.known, "{name}");
            again.ask_reference(&policy, "another", 3, (dir.path(), true), &mut NoEvents).unwrap();
            assert_ne!(again.known, comparing.known, "{name}");
            std::fs::write(&path, b"damaged").unwrap();
            again.ask_reference(&base, "base", 5, (dir.path(), true), &mut NoEvents).unwrap();
            assert!(
                again.known[0].of_rows.iter().zip(&comparing.known[0].of_rows).all(|(a, b)| near(*a, *b)),
                "{name}"
            );
        }
    }
    assert_eq!(seen, 14, "every case of TRL but three");
}

#[test]
fn reward_models_are_those_of_trl() {
    let file = TensorFile::open(&folder().join("preference/reference.safetensors")).unwrap();
    let read = |name: &str| to_host(&file.read(name).unwrap()).unwrap();
    let scores: Vec<f64> =
        read("scores.chosen").into_iter().zip(read("scores.rejected")).flat_map(|(w, l)| [w, l]).collect();
    for case in json("cases.json").iter().filter(|case| case["name"].as_str().unwrap().starts_with("reward")) {
        let name = case["name"].as_str().unwrap();
        let center_rewards_coefficient = case["hyperparameters"]["center_rewards_coefficient"].as_f64().unwrap();
        let answer = |(i, score): (usize, &f64)| (i, std::slice::from_ref(score).to_vec());
        let numbers: Vec<(usize, Vec<f64>)> = scores.iter().enumerate().map(answer).collect();
        let list: Vec<Answer<'_>> =
            numbers.iter().map(|(i, logps)| Answer { logps, reference: 0.0, good: i.is_multiple_of(2) }).collect();
        let judged = RewardModel { center_rewards_coefficient }.judge(&list, 0.0);
        let pairs = (list.len() / 2) as f64;
        assert!(near(judged.loss / pairs, case["loss"].as_f64().unwrap()), "{name}: {}", judged.loss / pairs);
        for (side, part) in ["chosen", "rejected"].iter().enumerate() {
            for (i, wanted) in read(&format!("{name}.grad.scores.{part}")).into_iter().enumerate() {
                let got = judged.slopes[2 * i + side][0] / pairs;
                assert!(near(got, wanted), "{name}: slope {got} against {wanted}");
            }
        }
    }
}

#[test]
fn unrelated_answers_are_those_before() {
    let answers = rated(&Value::Null);
    let unrelated = answers.unrelated.as_ref().unwrap();
    let (first, last) = (answers.rows.example(0).unwrap(), answers.rows.example(answers.rows.len() - 1).unwrap());
    let crossed = unrelated.example(0).unwrap();
    let begin = |e: &Example| e.trained.iter().position(|t| *t).unwrap();
    assert_eq!(crossed.input_ids[..begin(&crossed)], first.input_ids[..begin(&first)]);
    assert_eq!(crossed.input_ids[begin(&crossed)..], last.input_ids[begin(&last)..]);
    let chosen = answers.select(&[2, 2, 0]).unwrap();
    assert_eq!((chosen.rows.len(), chosen.good.len()), (3, 3));
    assert_eq!(chosen.unrelated.unwrap().example(2).unwrap(), crossed);
}
