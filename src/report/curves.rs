//! The lines of `metrics.jsonl` as curves over one time axis: the stages follow each other, whatever each counts from.

use serde::Deserialize;

use super::plot::{Band, Series};

/// A line of `metrics.jsonl`, as far as the page shows it. A line may lack any field.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct MetricsLine {
    /// The stage, such as `train`.
    pub stage: Option<String>,
    /// The epoch, from 1.
    pub epoch: Option<f64>,
    /// Steps of the stage taken.
    pub step: Option<f64>,
    /// Mean loss of the training images.
    pub train_loss: Option<f64>,
    /// Accuracy on the training images, percent.
    pub train_top1: Option<f64>,
    /// Mean loss of the test images.
    pub test_loss: Option<f64>,
    /// Accuracy on the test images, percent.
    pub test_top1: Option<f64>,
    /// Keep scores, one per block.
    pub scores: Option<Vec<f64>>,
}

impl MetricsLine {
    /// The lines of a file. One that a killed process left half-written is no record.
    pub fn read_all(text: &str) -> Vec<Self> {
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

/// Metrics placed on the common axis.
pub(super) struct Curves<'a> {
    /// The stages in order.
    pub bands: Vec<Band>,
    /// (stage index, x, record), sorted by stage, then x.
    records: Vec<(usize, f64, &'a MetricsLine)>,
}

impl<'a> Curves<'a> {
    /// Places every record of a stage at its step behind all steps of the stages before. Where steps are missing the
    /// epoch counts, else the record's place. A step that was run twice, after a resume, counts as it was run last.
    pub fn new(metrics: &'a [MetricsLine]) -> Self {
        let mut stages: Vec<(&str, Vec<(f64, &MetricsLine)>)> = Vec::new();
        for record in metrics {
            let Some(name) = record.stage.as_deref() else { continue };
            let place = stages.iter().position(|(stage, _)| *stage == name).unwrap_or_else(|| {
                stages.push((name, Vec::new()));
                stages.len() - 1
            });
            let ordinal = stages[place].1.len() as f64;
            let x = record.step.or(record.epoch).unwrap_or(ordinal);
            stages[place].1.push((x, record));
        }
        let (mut bands, mut records): (Vec<Band>, Vec<_>) = (Vec::new(), Vec::new());
        let mut offset = 0.0;
        for (index, (name, mut stage)) in stages.into_iter().enumerate() {
            stage.sort_by(|a, b| a.0.total_cmp(&b.0));
            let (first, last) = (stage[0].0, stage[stage.len() - 1].0);
            // Steps either start anew in every stage or count on.
            let shift = if first >= offset && index > 0 { 0.0 } else { offset };
            let end = (last + shift).max(offset);
            bands.push(Band { name: name.to_owned(), from: offset, to: end });
            records.extend(stage.into_iter().map(|(x, record)| (index, x + shift, record)));
            offset = end;
        }
        Self { bands, records }
    }

    /// One value of every record that has it, interrupted between stages.
    pub fn series(&self, value: fn(&MetricsLine) -> Option<f64>, name: &str, class: &'static str) -> Series {
        self.collect(name, class, value)
    }

    /// The score of every block over the search. `kept` colours them.
    pub fn scores(&self, names: &[&str], kept: &[bool]) -> Vec<Series> {
        let count = self.records.iter().filter_map(|(_, _, r)| r.scores.as_ref().map(Vec::len)).max();
        (0..count.unwrap_or(0))
            .map(|block| {
                let name = names.get(block).map_or_else(|| format!("{block}"), |n| (*n).to_owned());
                let class = if kept.get(block).copied().unwrap_or(true) { "c-kept" } else { "c-merged" };
                self.collect(&name, class, |record| record.scores.as_ref()?.get(block).copied())
            })
            .collect()
    }

    /// The stage in which scores were recorded.
    pub fn score_band(&self) -> Option<Band> {
        let (stage, ..) = self.records.iter().find(|(_, _, r)| r.scores.is_some())?;
        Some(self.bands[*stage].clone())
    }

    fn collect(&self, name: &str, class: &'static str, value: impl Fn(&MetricsLine) -> Option<f64>) -> Series {
        let mut pieces = vec![Vec::new(); self.bands.len()];
        for (stage, x, record) in &self.records {
            let Some(y) = value(record) else { continue };
            let piece: &mut Vec<(f64, f64)> = &mut pieces[*stage];
            match piece.last_mut() {
                Some(last) if last.0 == *x => last.1 = y,
                _ => piece.push((*x, y)),
            }
        }
        Series { name: name.to_owned(), class, pieces }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(lines: &[&str]) -> Vec<MetricsLine> {
        MetricsLine::read_all(&lines.join("\n"))
    }

    #[test]
    fn stages_follow_each_other_whether_steps_start_anew_or_count_on() {
        let train = [
            r#"{"stage": "train", "step": 100, "test_top1": 80.0}"#,
            r#"{"stage": "train", "step": 200, "test_top1": 85.0}"#,
        ];
        for search in [
            r#"{"stage": "search", "step": 50, "test_top1": 82.0}"#,
            r#"{"stage": "search", "step": 250, "test_top1": 82.0}"#,
        ] {
            let metrics = lines(&[train[0], train[1], search]);
            let curves = Curves::new(&metrics);
            let pieces = curves.series(|r| r.test_top1, "test", "c-test").pieces;
            assert_eq!(pieces, [vec![(100.0, 80.0), (200.0, 85.0)], vec![(250.0, 82.0)]]);
            assert_eq!(curves.bands[1], Band { name: "search".into(), from: 200.0, to: 250.0 });
        }
    }

    #[test]
    fn a_step_run_twice_counts_once() {
        let metrics = lines(&[
            r#"{"stage": "train", "step": 10, "train_loss": 2.0}"#,
            r#"{"stage": "train", "step": 20, "train_loss": 9.0}"#,
            r#"{"stage": "train", "step": 20, "train_loss": 1.0}"#,
        ]);
        let pieces = Curves::new(&metrics).series(|r| r.train_loss, "train", "c-train").pieces;
        assert_eq!(pieces, [vec![(10.0, 2.0), (20.0, 1.0)]]);
    }

    #[test]
    fn what_is_no_record_is_left_out() {
        let lines = lines(&[r#"{"odd": 1}"#, "3", r#"{"stage": "train", "train_loss": null}"#, r#"{"half a li"#]);
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[1], MetricsLine { stage: Some("train".into()), ..MetricsLine::default() });
    }
}
