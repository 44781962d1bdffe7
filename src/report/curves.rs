//! The lines of `metrics.jsonl` as curves over one time axis: the stages follow each other, whatever each counts from.

use serde_json::Value;

use super::plot::{Band, Series};

/// Metrics placed on the common axis.
pub(super) struct Curves<'a> {
    /// The stages in order.
    pub bands: Vec<Band>,
    /// (stage index, x, record), sorted by stage, then x.
    records: Vec<(usize, f64, &'a Value)>,
}

impl<'a> Curves<'a> {
    /// Places every record of a stage at its step behind all steps of the stages before. Where steps are missing the
    /// epoch counts, else the record's place. A step that was run twice, after a resume, counts as it was run last.
    pub fn new(metrics: &'a [Value]) -> Self {
        let mut stages: Vec<(&str, Vec<(f64, &Value)>)> = Vec::new();
        for record in metrics {
            let Some(name) = record.get("stage").and_then(Value::as_str) else { continue };
            let place = stages.iter().position(|(stage, _)| *stage == name).unwrap_or_else(|| {
                stages.push((name, Vec::new()));
                stages.len() - 1
            });
            let ordinal = stages[place].1.len() as f64;
            let x = number(record, "step").or_else(|| number(record, "epoch")).unwrap_or(ordinal);
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
    pub fn series(&self, key: &str, name: &str, class: &'static str) -> Series {
        self.collect(name, class, |record| number(record, key))
    }

    /// The score of every block over the search. `kept` colours them.
    pub fn scores(&self, names: &[&str], kept: &[bool]) -> Vec<Series> {
        let count = self.records.iter().filter_map(|(_, _, r)| r.get("scores")?.as_array().map(Vec::len)).max();
        (0..count.unwrap_or(0))
            .map(|block| {
                let name = names.get(block).map_or_else(|| format!("{block}"), |n| (*n).to_owned());
                let class = if kept.get(block).copied().unwrap_or(true) { "c-kept" } else { "c-merged" };
                self.collect(&name, class, |record| record.get("scores")?.get(block)?.as_f64())
            })
            .collect()
    }

    /// The stage in which scores were recorded.
    pub fn score_band(&self) -> Option<Band> {
        let (stage, ..) = self.records.iter().find(|(_, _, r)| r.get("scores").is_some())?;
        Some(self.bands[*stage].clone())
    }

    fn collect(&self, name: &str, class: &'static str, value: impl Fn(&Value) -> Option<f64>) -> Series {
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

fn number(record: &Value, key: &str) -> Option<f64> {
    record.get(key)?.as_f64()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn stages_follow_each_other_whether_steps_start_anew_or_count_on() {
        let anew = [
            json!({"stage": "train", "step": 100, "test_top1": 80.0}),
            json!({"stage": "train", "step": 200, "test_top1": 85.0}),
            json!({"stage": "search", "step": 50, "test_top1": 82.0}),
        ];
        let on = [anew[0].clone(), anew[1].clone(), json!({"stage": "search", "step": 250, "test_top1": 82.0})];
        for metrics in [&anew, &on] {
            let curves = Curves::new(metrics);
            let pieces = curves.series("test_top1", "test", "c-test").pieces;
            assert_eq!(pieces, [vec![(100.0, 80.0), (200.0, 85.0)], vec![(250.0, 82.0)]]);
            assert_eq!(curves.bands[1], Band { name: "search".into(), from: 200.0, to: 250.0 });
        }
    }

    #[test]
    fn a_step_run_twice_counts_once() {
        let metrics = [
            json!({"stage": "train", "step": 10, "train_loss": 2.0}),
            json!({"stage": "train", "step": 20, "train_loss": 9.0}),
            json!({"stage": "train", "step": 20, "train_loss": 1.0}),
        ];
        let pieces = Curves::new(&metrics).series("train_loss", "train", "c-train").pieces;
        assert_eq!(pieces, [vec![(10.0, 2.0), (20.0, 1.0)]]);
    }
}
