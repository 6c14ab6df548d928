//! Optimizers and spans of time in a configuration.

use super::*;

#[test]
fn optimizers_have_several_names_and_lion_its_own_decay() {
    let optim = |name: &str| compared(&[&format!("train.optim={name}")]).unwrap().train;
    for (name, own) in [
        ("adamw", Optim::AdamW),
        ("adamw_torch", Optim::AdamW),
        ("adamw_torch_fused", Optim::AdamW),
        ("adamw_8bit", Optim::AdamW8),
        ("adamw_bnb_8bit", Optim::AdamW8),
        ("lion", Optim::Lion),
        ("lion_32bit", Optim::Lion),
    ] {
        assert_eq!(optim(name).optim, own, "{name}");
        assert_eq!(optim(name).adam_beta2, if own == Optim::Lion { 0.99 } else { 0.999 }, "{name}");
    }
    let said = compared(&["train.optim=lion", "train.adam_beta2=0.95"]).unwrap();
    assert_eq!(said.train.adam_beta2, 0.95);
    let wrong = compared(&["train.optim=adamw_8bit", "train.finetuning_type=full", "model.dtype=bfloat16"]);
    assert_eq!(wrong.unwrap_err().faults()[0].key, "train.optim");
}

#[test]
fn a_time_is_days_hours_minutes_and_seconds() {
    for (text, seconds) in [
        ("2h30m", Some(9000)),
        ("90m", Some(5400)),
        ("45s", Some(45)),
        ("1d", Some(86_400)),
        ("1d2h3m4s", Some(93_784)),
        (" 10s ", Some(10)),
        ("30m2h", None),
        ("0s", None),
        ("", None),
        ("h", None),
        ("5", None),
        ("-5s", None),
        ("1.5h", None),
        ("1h1h", None),
        ("99999999999999999999s", None),
        ("18446744073709551615d", None),
    ] {
        assert_eq!(crate::config::keys::span(text).map(|s| s.as_secs()), seconds, "{text}");
        assert_eq!(compared(&[&format!("train.max_time={text:?}")]).is_ok(), seconds.is_some(), "{text}");
    }
    assert!(toml_faults(&format!("{MINIMAL}[train]\nmax_time = 90\n"), &[]).contains("\"2h30m\""));
}
