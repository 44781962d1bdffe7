//! The learning rate as a pure function of the step, so that a resumed run goes on with the same numbers.

use serde::{Deserialize, Serialize};

/// One-cycle starts at this share of the peak (Smith & Topin, 2018; PyTorch's default).
const ONE_CYCLE_START: f64 = 1.0 / 25.0;
/// One-cycle rises over this share of all steps.
const ONE_CYCLE_RISE: f64 = 0.3;

/// Course of the learning rate over a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Linear warm-up, then half a cosine from the peak to the floor.
    #[default]
    Cosine,
    /// Linear warm-up, then the peak throughout.
    Constant,
    /// Half a cosine up over the first 30 % of the steps, half a cosine down to the floor; its rise is its warm-up.
    OneCycle,
}

/// The range of the learning rate and the length of a stage.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Course {
    /// The highest learning rate.
    pub peak: f32,
    /// The learning rate at the end.
    pub floor: f32,
    /// Steps of the warm-up; they need not be whole.
    pub warmup: f64,
    /// All steps of the stage.
    pub total: u64,
}

impl Schedule {
    /// Learning rate of a step, counted over the stage.
    pub fn rate(self, course: Course, step: u64) -> f32 {
        let (peak, floor, warmup) = (f64::from(course.peak), f64::from(course.floor), course.warmup);
        let (step, total) = (step as f64, course.total as f64);
        let rate = match self {
            Self::Cosine | Self::Constant if step < warmup => peak * ((step + 1.0) / warmup).min(1.0),
            Self::Constant => peak,
            Self::Cosine => half_cosine(peak, floor, (step - warmup) / (total - warmup)),
            Self::OneCycle => {
                let rise = ONE_CYCLE_RISE * total;
                if step < rise {
                    half_cosine(peak * ONE_CYCLE_START, peak, step / rise)
                } else {
                    half_cosine(peak, floor, (step - rise) / (total - rise))
                }
            }
        };
        rate as f32
    }
}

/// From `a` at 0 to `b` at 1.
fn half_cosine(a: f64, b: f64, at: f64) -> f64 {
    let at = at.clamp(0.0, 1.0);
    b + (a - b) * 0.5 * (1.0 + (std::f64::consts::PI * at).cos())
}

#[cfg(test)]
mod tests {
    use super::{Course, Schedule};

    #[test]
    fn cosine_rises_peaks_and_falls_to_the_floor() {
        let rate = |step| Schedule::Cosine.rate(Course { peak: 1.0, floor: 0.1, warmup: 10.0, total: 110 }, step);
        assert_eq!(rate(0), 0.1);
        assert_eq!(rate(9), 1.0);
        assert_eq!(rate(10), 1.0);
        assert!((rate(60) - 0.55).abs() < 1e-6);
        assert!((rate(110) - 0.1).abs() < 1e-6);
        assert!((10..110).all(|step| rate(step + 1) <= rate(step)));
    }

    #[test]
    fn the_others_reach_their_peak() {
        assert_eq!(Schedule::Constant.rate(Course { peak: 0.5, floor: 0.0, warmup: 0.0, total: 100 }, 99), 0.5);
        let course = Course { peak: 1.0, floor: 0.0, warmup: 0.0, total: 100 };
        let one_cycle = |step| Schedule::OneCycle.rate(course, step);
        assert!((one_cycle(0) - 0.04).abs() < 1e-6 && one_cycle(30) == 1.0 && one_cycle(100) == 0.0);
        assert_eq!(
            Schedule::Cosine.rate(Course { warmup: 500.0, ..course }, 99),
            0.2,
            "a warm-up longer than the stage"
        );
    }
}
