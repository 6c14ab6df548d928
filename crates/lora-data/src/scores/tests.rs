use super::*;
use proptest::prelude::*;
use serde_json::Value;
use std::path::Path;

/// Sums of a few hundred numbers of at most 100 in fp64: some hundred roundings of 1e-14.
const F64_TOLERANCE: f64 = 1e-9;

fn reference() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/scores/reference.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn written(value: &Value) -> Written {
    let text = |v: &Value| v.as_str().unwrap().to_string();
    Written {
        text: text(&value["text"]),
        references: value["references"].as_array().unwrap().iter().map(text).collect(),
    }
}

fn check(name: &str, scores: Scores, wanted: &Value) {
    for (what, got) in
        [("bleu", scores.bleu), ("chrf", scores.chrf), ("rouge_l", scores.rouge_l), ("exact_match", scores.exact_match)]
    {
        let wanted = wanted[what].as_f64().unwrap();
        assert!((got - wanted).abs() < F64_TOLERANCE, "{name}: {what} {got} and not {wanted}");
    }
}

#[test]
fn scores_are_those_of_sacrebleu_and_rouge_score() {
    let file = reference();
    let cases = file["cases"].as_array().unwrap();
    assert!(cases.len() > 30);
    let all: Vec<Written> = cases.iter().map(written).collect();
    for (case, one) in cases.iter().zip(&all) {
        let words: Vec<&str> = case["words"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        assert_eq!(bleu::words(&one.text), words, "{:?}", one.text);
        check(&format!("{one:?}"), Scores::of(std::slice::from_ref(one)), &case["scores"]);
    }
    check("all", Scores::of(&all), &file["all"]);
    let first = |one: &Written| Written { references: one.references[..1].to_vec(), ..one.clone() };
    check("one reference each", Scores::of(&all.iter().map(first).collect::<Vec<_>>()), &file["first"]);
}

#[test]
fn nothing_scores_nothing() {
    assert_eq!(Scores::of(&[]), Scores::default());
    let empty = Written { text: String::new(), references: vec![String::new()] };
    let scores = Scores::of(&[empty]);
    assert_eq!((scores.bleu, scores.chrf, scores.rouge_l, scores.exact_match), (0.0, 0.0, 0.0, 1.0));
}

fn sentence() -> impl Strategy<Value = String> {
    proptest::collection::vec("[a-c]|the|it|[.,-]|[é中]|[0-9]{1,2}", 0..12).prop_map(|words| words.join(" "))
}

fn pair(text: &str, references: &[&str]) -> Written {
    Written { text: text.into(), references: references.iter().map(|r| (*r).to_string()).collect() }
}

proptest! {
    #[test]
    fn scores_have_bounds_and_a_text_is_itself(text in sentence(), other in sentence(), third in sentence()) {
        let scores = Scores::of(&[pair(&text, &[&other])]);
        for (score, most) in [(scores.bleu, 100.0), (scores.chrf, 100.0), (scores.rouge_l, 1.0), (scores.exact_match, 1.0)] {
            prop_assert!((0.0..=most + F64_TOLERANCE).contains(&score), "{scores:?}");
        }
        let own = Scores::of(&[pair(&text, &[&other, &text])]);
        prop_assert_eq!(own.exact_match, 1.0);
        if bleu::words(&text).len() >= 4 {
            prop_assert!((own.bleu - 100.0).abs() < F64_TOLERANCE && (own.chrf - 100.0).abs() < F64_TOLERANCE, "{own:?}");
        }
        // Which comes first does not matter to the F of ROUGE, and one more reference never makes it worse.
        let turned = Scores::of(&[pair(&other, &[&text])]);
        prop_assert!((turned.rouge_l - scores.rouge_l).abs() < F64_TOLERANCE);
        let more = Scores::of(&[pair(&text, &[&other, &third])]);
        prop_assert!(more.rouge_l >= scores.rouge_l);
        // Neither the order of references nor that of texts.
        let swapped = Scores::of(&[pair(&text, &[&third, &other])]);
        prop_assert!((swapped.bleu - more.bleu).abs() < F64_TOLERANCE && (swapped.rouge_l - more.rouge_l).abs() < F64_TOLERANCE);
        let two = [pair(&text, &[&other]), pair(&other, &[&third])];
        let (ab, ba) = (Scores::of(&two), Scores::of(&[two[1].clone(), two[0].clone()]));
        prop_assert!((ab.bleu - ba.bleu).abs() < F64_TOLERANCE && (ab.chrf - ba.chrf).abs() < F64_TOLERANCE);
    }

    #[test]
    fn any_text_is_taken(text in "\\PC{0,40}", other in "\\PC{0,40}") {
        let scores = Scores::of(&[pair(&text, &[&other])]);
        prop_assert!(scores.bleu.is_finite() && scores.chrf.is_finite() && scores.rouge_l.is_finite());
    }
}
