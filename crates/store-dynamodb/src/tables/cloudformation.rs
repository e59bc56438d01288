//! Generates the CloudFormation template of the tables.

use serde_json::{Map, Value, json};

use super::{Projection, TABLES, TIME_TO_LIVE, Table};

/// Returns the template as JSON. It contains on-demand tables with streams, time to live, point-in-time recovery,
/// encryption and alarms. The tables are retained when the stack is deleted.
#[must_use]
pub fn cloudformation(default_prefix: &str) -> String {
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
    let template = json!({
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": "Tables of Streamer",
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

fn alarm(description: &str, metric: &str, dimensions: &Value, threshold: u32) -> Value {
    let mut properties = json!({
        "AlarmDescription": description,
        "Namespace": "AWS/DynamoDB",
        "MetricName": metric,
        "Statistic": "Sum",
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
    properties["Dimensions"] = dimensions.clone();
    json!({ "Type": "AWS::CloudWatch::Alarm", "Properties": properties })
}

fn throttle_alarm(table: &Table, id: &str) -> Value {
    alarm(
        &format!(
            "Writes to the {} table are throttled: requests are delayed, but not lost",
            table.name
        ),
        "WriteThrottleEvents",
        &json!([{ "Name": "TableName", "Value": { "Ref": id } }]),
        10,
    )
}

fn system_error_alarm() -> Value {
    alarm(
        "DynamoDB fails to append events",
        "SystemErrors",
        &json!([
            { "Name": "TableName", "Value": { "Ref": "RequestsTable" } },
            { "Name": "Operation", "Value": "UpdateItem" },
        ]),
        5,
    )
}
