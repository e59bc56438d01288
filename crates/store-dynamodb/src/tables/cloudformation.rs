//! Generates the CloudFormation template of the tables.

use serde_json::{Map, Value, json};

use super::{Projection, TABLES, TIME_TO_LIVE, Table};

/// Alarm of a metric that the services write to CloudWatch, for all services together.
#[derive(Clone, Copy, Debug)]
pub struct Alarm {
    /// Name of the metric; the alarm has the same name.
    pub metric: &'static str,
    /// Meaning of the alarm.
    pub description: &'static str,
    /// Statistic of one minute that is compared with the threshold.
    pub statistic: Statistic,
    /// Value above which the alarm is triggered, in 3 of 5 minutes.
    pub threshold: f64,
}

/// Statistic of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statistic {
    /// Sum of the values.
    Sum,
    /// Maximum of the values.
    Maximum,
    /// 99th percentile of the values.
    P99,
}

/// Returns the template as JSON. It contains on-demand tables with streams, time to live, point-in-time recovery,
/// encryption and alarms, and the given alarms of the services, whose metrics are in `namespace` by default. The tables
/// are retained when the stack is deleted.
#[must_use]
pub fn cloudformation(default_prefix: &str, namespace: &str, alarms: &[Alarm]) -> String {
    let mut resources = Map::new();
    let mut outputs = Map::new();
    for table in &TABLES {
        let id = format!("{}Table", capitalized(table.name));
        resources.insert(id.clone(), table_resource(table));
        resources.insert(
            format!("{}ThrottleAlarm", capitalized(table.name)),
            throttle_alarm(table, &id),
        );
        outputs.insert(
            format!("{id}Arn"),
            json!({ "Description": format!("ARN for policies: {}", table.holds),
                    "Value": { "Fn::GetAtt": [id, "Arn"] } }),
        );
        if table.stream {
            outputs.insert(
                format!("{id}StreamArn"),
                json!({ "Description": "Stream that notifies processors",
                        "Value": { "Fn::GetAtt": [id, "StreamArn"] } }),
            );
        }
    }
    resources.insert("SystemErrorAlarm".into(), system_error_alarm());
    for alarm in alarms {
        resources.insert(format!("{}Alarm", alarm.metric), service_alarm(alarm));
    }
    let template = json!({
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": "Tables and alarms of Streamer",
        "Parameters": {
            "TablePrefix": {
                "Type": "String",
                "Default": default_prefix,
                "AllowedPattern": "[A-Za-z0-9_.-]{0,200}",
                "Description": "Prefix of all table names (dynamodb.table_prefix)",
            },
            "AlarmTopicArn": {
                "Type": "String",
                "Default": "",
                "Description": "SNS topic that receives alarms; empty for none",
            },
            "MetricNamespace": {
                "Type": "String",
                "Default": namespace,
                "AllowedPattern": "[A-Za-z0-9_.#/-]{1,255}",
                "Description": "CloudWatch namespace of the metrics of the services (cloudwatch.namespace)",
            },
            "MaxUnitsPerSecond": {
                "Type": "Number",
                "Default": 0,
                "MinValue": 0,
                "Description": "Maximum read and write units of each table and index, which \
                    limits the cost of a mistake; 0 for no limit",
            },
        },
        "Conditions": {
            "IsBounded": { "Fn::Not": [{ "Fn::Equals": [{ "Ref": "MaxUnitsPerSecond" }, 0] }] },
            "HasAlarmTopic": { "Fn::Not": [{ "Fn::Equals": [{ "Ref": "AlarmTopicArn" }, ""] }] },
        },
        "Resources": resources,
        "Outputs": outputs,
    });
    format!("{template:#}\n")
}

fn capitalized(name: &str) -> String {
    let mut chars = name.chars();
    chars.next().map(|first| first.to_ascii_uppercase()).into_iter().chain(chars).collect()
}

fn full_name(table: &Table) -> Value {
    json!({ "Fn::Sub": format!("${{TablePrefix}}{}", table.name) })
}

fn throughput() -> Value {
    let maximum = json!({ "Ref": "MaxUnitsPerSecond" });
    let bounds = json!({ "MaxReadRequestUnits": maximum, "MaxWriteRequestUnits": maximum });
    json!({ "Fn::If": ["IsBounded", bounds, { "Ref": "AWS::NoValue" }] })
}

fn key_schema(names: &[&str]) -> Value {
    let kinds = ["HASH", "RANGE"];
    let elements = names.iter().zip(kinds);
    elements.map(|(name, kind)| json!({ "AttributeName": name, "KeyType": kind })).collect()
}

fn table_resource(table: &Table) -> Value {
    let mut properties = json!({
        "TableName": full_name(table),
        "BillingMode": "PAY_PER_REQUEST",
        "OnDemandThroughput": throughput(),
        "AttributeDefinitions": table
            .key_attributes()
            .iter()
            .map(|(name, kind)| json!({ "AttributeName": name, "AttributeType": kind.as_str() }))
            .collect::<Value>(),
        "KeySchema": key_schema(table.key),
        "TimeToLiveSpecification": { "AttributeName": TIME_TO_LIVE, "Enabled": true },
        "PointInTimeRecoverySpecification": { "PointInTimeRecoveryEnabled": true },
        "SSESpecification": { "SSEEnabled": true },
    });
    if !table.indexes.is_empty() {
        properties["GlobalSecondaryIndexes"] = table
            .indexes
            .iter()
            .map(|index| {
                let (partition, sort, _) = index.key;
                let projection = match index.projection {
                    Projection::KeysOnly => json!({ "ProjectionType": "KEYS_ONLY" }),
                    Projection::All => json!({ "ProjectionType": "ALL" }),
                    Projection::Include(names) => {
                        json!({ "ProjectionType": "INCLUDE", "NonKeyAttributes": names })
                    }
                };
                json!({
                    "IndexName": index.name,
                    "KeySchema": key_schema(&[partition, sort]),
                    "Projection": projection,
                    "OnDemandThroughput": throughput(),
                })
            })
            .collect();
    }
    if table.stream {
        properties["StreamSpecification"] = json!({ "StreamViewType": "NEW_IMAGE" });
    }
    json!({
        "Type": "AWS::DynamoDB::Table",
        "DeletionPolicy": "Retain",
        "UpdateReplacePolicy": "Retain",
        "Properties": properties,
    })
}

fn alarm(
    description: &str,
    (namespace, metric): (&Value, &str),
    statistic: Statistic,
    threshold: f64,
) -> Value {
    let mut properties = json!({
        "AlarmDescription": description,
        "Namespace": namespace,
        "MetricName": metric,
        "Period": 60,
        "EvaluationPeriods": 5,
        "DatapointsToAlarm": 3,
        "Threshold": threshold,
        "ComparisonOperator": "GreaterThanThreshold",
        "TreatMissingData": "notBreaching",
        "AlarmActions": {
            "Fn::If": [
                "HasAlarmTopic",
                [{ "Ref": "AlarmTopicArn" }],
                { "Ref": "AWS::NoValue" },
            ]
        },
    });
    match statistic {
        Statistic::Sum => properties["Statistic"] = "Sum".into(),
        Statistic::Maximum => properties["Statistic"] = "Maximum".into(),
        Statistic::P99 => properties["ExtendedStatistic"] = "p99".into(),
    }
    json!({ "Type": "AWS::CloudWatch::Alarm", "Properties": properties })
}

fn table_alarm(description: &str, metric: &str, dimensions: Value, threshold: f64) -> Value {
    let metric = (&"AWS/DynamoDB".into(), metric);
    let mut alarm = alarm(description, metric, Statistic::Sum, threshold);
    alarm["Properties"]["Dimensions"] = dimensions;
    alarm
}

fn service_alarm(service: &Alarm) -> Value {
    let metric = (&json!({ "Ref": "MetricNamespace" }), service.metric);
    alarm(service.description, metric, service.statistic, service.threshold)
}

fn throttle_alarm(table: &Table, id: &str) -> Value {
    table_alarm(
        &format!(
            "Writes to the {} table are throttled: requests are delayed, but not lost",
            table.name
        ),
        "WriteThrottleEvents",
        json!([{ "Name": "TableName", "Value": { "Ref": id } }]),
        10.0,
    )
}

fn system_error_alarm() -> Value {
    table_alarm(
        "DynamoDB fails to append events",
        "SystemErrors",
        json!([
            { "Name": "TableName", "Value": { "Ref": "RequestsTable" } },
            { "Name": "Operation", "Value": "UpdateItem" },
        ]),
        5.0,
    )
}
