//! Records as CSV.

use serde::Serialize;
use serde_json::{Value, json};

/// Records as CSV: name and pass where they have them, then a column for every other key that any of them has, lists and objects as JSON in
/// quotes. A record that is not an object becomes an empty row.
pub fn csv<R: Serialize>(records: &[R]) -> String {
    let records: Vec<Value> = records.iter().map(|record| json!(record)).collect();
    let mut keys = vec!["name", "pass"];
    keys.retain(|key| records.iter().any(|record| record.get(key).is_some()));
    for (key, _) in records.iter().filter_map(Value::as_object).flatten() {
        if !keys.contains(&key.as_str()) {
            keys.push(key);
        }
    }
    let mut out = format!("{}\n", keys.join(","));
    for record in &records {
        let fields: Vec<String> = keys.iter().map(|key| field(&record[*key])).collect();
        out.push_str(&fields.join(","));
        out.push('\n');
    }
    out
}

fn field(value: &Value) -> String {
    let text = match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    if text.contains([',', '"', '\n']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_what_would_break_a_row() {
        let records = [json!({"name": "x,\"y\"", "b": [1, 2]}), json!({"b": 3.5, "c": null, "pass": "fwd"})];
        assert_eq!(csv(&records), "name,pass,b,c\n\"x,\"\"y\"\"\",,\"[1,2]\",\n,fwd,3.5,\n");
    }
}
