use super::*;
use proptest::prelude::*;

/// `[o.param_groups[0]["lr"] ...]` of `transformers.get_scheduler(kind, o, num_warmup_steps=w, num_training_steps=t)`
/// (5.23.0) on an optimizer with lr=2e-4, read before each `o.step(); s.step()`.
const GOLDEN: &[(ScheduleKind, u64, u64, &[f64])] = &[
    (
        ScheduleKind::Linear,
        3,
        10,
        &[
            0.0,
            6.666666666666667e-05,
            0.00013333333333333334,
            0.0002,
            0.00017142857142857143,
            0.00014285714285714287,
            0.00011428571428571428,
            8.571428571428571e-05,
            5.714285714285714e-05,
            2.857142857142857e-05,
            0.0,
            0.0,
        ],
    ),
    (ScheduleKind::Linear, 0, 4, &[0.0002, 0.00015000000000000001, 0.0001, 5e-05, 0.0, 0.0]),
    (
        ScheduleKind::Linear,
        10,
        10,
        &[0.0, 2e-05, 4e-05, 6e-05, 8e-05, 0.0001, 0.00012, 0.00014, 0.00016, 0.00018, 0.0, 0.0],
    ),
    (
        ScheduleKind::Cosine,
        3,
        10,
        &[
            0.0,
            6.666666666666667e-05,
            0.00013333333333333334,
            0.0002,
            0.0001900968867902419,
            0.00016234898018587337,
            0.00012225209339563145,
            7.774790660436858e-05,
            3.7651019814126654e-05,
            9.903113209758096e-06,
            0.0,
            9.903113209758086e-06,
        ],
    ),
    (
        ScheduleKind::Cosine,
        0,
        5,
        &[
            0.0002,
            0.00018090169943749476,
            0.00013090169943749476,
            6.909830056250527e-05,
            1.9098300562505266e-05,
            0.0,
            1.9098300562505246e-05,
        ],
    ),
    (ScheduleKind::Cosine, 2, 2, &[0.0, 0.0001, 0.0002, 0.0]),
    (ScheduleKind::Constant, 0, 3, &[0.0002, 0.0002, 0.0002, 0.0002, 0.0002]),
    (
        ScheduleKind::ConstantWithWarmup,
        4,
        6,
        &[0.0, 5e-05, 0.0001, 0.00015000000000000001, 0.0002, 0.0002, 0.0002, 0.0002],
    ),
];

#[test]
fn equals_transformers() {
    for &(kind, warmup_steps, total_steps, expected) in GOLDEN {
        let config = TrainConfig {
            lr_scheduler_type: kind,
            learning_rate: 2e-4,
            warmup_steps: Some(warmup_steps),
            ..TrainConfig::default()
        };
        let schedule = Schedule::new(&config, total_steps);
        for (step, expected) in expected.iter().enumerate() {
            let lr = schedule.lr_at(step as u64);
            assert!(
                (lr - expected).abs() <= 4.0 * f64::EPSILON * schedule.base_lr,
                "{schedule:?} at {step}: {lr} {expected}"
            );
        }
    }
}

/// The same with `scheduler_specific_kwargs`.
#[test]
fn equals_transformers_with_options() {
    use ScheduleKind::{CosineWithMinLr, CosineWithRestarts, InverseSqrt, Polynomial, WarmupStableDecay};
    for (kind, warmup_steps, total_steps, options, expected) in [
        (
            CosineWithRestarts,
            2,
            10,
            "num_cycles = 2",
            &[
                0.0,
                0.0001,
                0.0002,
                0.00017071067811865476,
                0.0001,
                2.9289321881345254e-05,
                0.0002,
                0.00017071067811865476,
                0.0001,
                2.9289321881345254e-05,
                0.0,
            ][..],
        ),
        (CosineWithRestarts, 0, 4, "", &[0.0002, 0.00017071067811865476, 0.0001, 2.9289321881345254e-05, 0.0]),
        (
            Polynomial,
            2,
            8,
            "",
            &[
                0.0,
                0.0001,
                0.0002,
                0.00016668333333333334,
                0.0001333666666666667,
                0.00010005,
                6.673333333333335e-05,
                3.341666666666666e-05,
                9.999999999999998e-08,
                9.999999999999998e-08,
            ],
        ),
        (Polynomial, 0, 4, "power = 2.0\nlr_end = 1e-5", &[0.0002, 0.000116875, 5.75e-05, 2.1875e-05, 1e-05, 1e-05]),
        (
            InverseSqrt,
            3,
            10,
            "",
            &[
                0.0,
                6.666666666666667e-05,
                0.00013333333333333334,
                0.0002,
                0.00017320508075688776,
                0.0001549193338482967,
                0.0001414213562373095,
            ],
        ),
        (
            InverseSqrt,
            2,
            10,
            "timescale = 5",
            &[0.0, 0.0001, 0.0002, 0.0001825741858350554, 0.00016903085094570333, 0.00015811388300841897],
        ),
        (
            WarmupStableDecay,
            2,
            10,
            "num_decay_steps = 4",
            &[
                0.0,
                0.0001,
                0.0002,
                0.0002,
                0.0002,
                0.0002,
                0.0002,
                0.00017071067811865476,
                0.0001,
                2.9289321881345254e-05,
                0.0,
            ],
        ),
        (
            WarmupStableDecay,
            0,
            6,
            "num_decay_steps = 3\nmin_lr_ratio = 0.1",
            &[0.0002, 0.0002, 0.0002, 0.0002, 0.000155, 6.5e-05, 2e-05],
        ),
        (
            CosineWithMinLr,
            2,
            8,
            "min_lr_rate = 0.1",
            &[0.0, 0.0001, 0.0002, 0.0001879422863405995, 0.000155, 0.00011, 6.5e-05, 3.205771365940052e-05, 2e-05],
        ),
        (
            CosineWithMinLr,
            0,
            4,
            "min_lr = 1e-5",
            &[0.0002, 0.00017217514421272203, 0.000105, 3.782485578727799e-05, 1e-05],
        ),
    ] {
        let config = TrainConfig {
            lr_scheduler_type: kind,
            learning_rate: 2e-4,
            warmup_steps: Some(warmup_steps),
            lr_scheduler_kwargs: options.parse().unwrap(),
            ..TrainConfig::default()
        };
        let schedule = Schedule::new(&config, total_steps);
        for (step, expected) in expected.iter().enumerate() {
            let lr = schedule.lr_at(step as u64);
            assert!(
                (lr - expected).abs() <= 8.0 * f64::EPSILON * schedule.base_lr,
                "{schedule:?} at {step}: {lr} {expected}"
            );
        }
    }
}

/// `TrainingArguments(warmup_steps=ratio).get_warmup_steps(total)` of transformers 5.23.0.
#[test]
fn a_ratio_is_rounded_up_as_in_transformers() {
    for (ratio, total, expected) in [(0.03, 100, 3), (0.03, 101, 4), (0.1, 7, 1), (0.5, 3, 2), (0.03, 20, 1)] {
        let config = TrainConfig { warmup_ratio: Some(ratio), ..TrainConfig::default() };
        assert_eq!(Schedule::new(&config, total).warmup_steps, expected, "{ratio} of {total}");
    }
    assert_eq!(TrainConfig::default().warmup(1000), 0);
    assert_eq!(TrainConfig { warmup_steps: Some(7), ..TrainConfig::default() }.warmup(1000), 7);
}

proptest! {
    #[test]
    fn stays_within_bounds_and_is_continuous_where_the_warm_up_ends(
        kind in proptest::sample::select(ScheduleKind::ALL),
        base_lr in 1e-8f64..10.0,
        warmup_steps in 0u64..500,
        after in 1u64..5000,
    ) {
        let total_steps = warmup_steps + after;
        let config = TrainConfig {
            lr_scheduler_type: kind,
            learning_rate: base_lr,
            warmup_steps: Some(warmup_steps),
            // A polynomial's end is a learning rate of its own, which must be below the highest.
            lr_scheduler_kwargs: if kind == ScheduleKind::Polynomial { "lr_end = 0".parse().unwrap() } else { toml::Table::new() },
            ..TrainConfig::default()
        };
        let schedule = Schedule::new(&config, total_steps);
        let fall = if kind == ScheduleKind::WarmupStableDecay { total_steps.div_ceil(10).min(after) } else { after };
        let slope = base_lr * 1.6 / (if warmup_steps == 0 { fall } else { fall.min(warmup_steps) }) as f64;
        for step in 0..total_steps {
            let (lr, next) = (schedule.lr_at(step), schedule.lr_at(step + 1));
            prop_assert!((0.0..=base_lr).contains(&lr));
            prop_assert!((next - lr).abs() <= slope, "{schedule:?} jumps at {step}: {lr} {next}");
        }
        prop_assert_eq!(schedule.lr_at(warmup_steps), base_lr);
        let stays = [ScheduleKind::Constant, ScheduleKind::ConstantWithWarmup, ScheduleKind::InverseSqrt];
        if !stays.contains(&kind) {
            prop_assert!(schedule.lr_at(total_steps) <= base_lr * 16.0 * f64::EPSILON);
        }
    }
}
